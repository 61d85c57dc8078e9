"""How tokens are chosen where nobody says: as the model's generation_config.json suggests, else mildly at random.

The same for `LLM.generate`, `LLM.chat` and the commands, so that they answer alike.
"""

from pathlib import Path
from typing import Any

from hetero_attn.checkpoints.sources import is_gguf
from hetero_attn.serving.sampling_params import SamplingParams
from hetero_attn.spec.json_fields import read_json

FALLBACK = {"temperature": 0.7, "top_p": 0.95}
_SUGGESTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def default_params(path: Path, **given: Any) -> SamplingParams:
    """The parameters of a request to the model in a directory, or in a GGUF file with what lies beside it; `given` wins
    over what the model suggests.

    Raises SamplingError for a given value out of range, ConfigError for a generation_config.json that is no JSON
    object.
    """
    return SamplingParams(**(_suggestion(path) | given))


def _suggestion(path: Path) -> dict[str, Any]:
    """What generation_config.json says about sampling; one that says nothing leaves it to FALLBACK.

    `do_sample: false` asks for greedy decoding. A value that no sampler could use is left out: what is suggested and
    nonsense must not stop a model from answering.
    """
    file = (path.parent if is_gguf(path) else path) / "generation_config.json"
    fields = read_json(file) if file.is_file() else {}
    if fields.get("do_sample") is False:
        return {"temperature": 0.0}
    found = {name: fields[name] for name in _SUGGESTED if fields.get(name) is not None}
    usable = {name: value for name, value in found.items() if _is_usable(name, value)}
    return usable or dict(FALLBACK)


def _is_usable(name: str, value: Any) -> bool:
    try:
        SamplingParams(**{name: value})
    except ValueError:
        return False
    return True
