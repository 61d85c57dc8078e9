"""The shipped model with another chat template, and answers that are written down in place of those that it computes."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hetero_attn.llm import LLM
from hetero_attn.serving.sampling import SampledToken, Sampler
from tests.support.server.http_server import TINY, load_tiny

# As Qwen's templates are built: tools in the system message, calls and their results between tags, thinking opened.
TEMPLATE = """{{ bos_token }}{% if tools %}<|system|>Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}{{ eos_token }}{% endif %}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}
{%- if message['reasoning_content'] is defined %}<think>{{ message['reasoning_content'] }}</think>{% endif %}
{{- message['content'] }}{% for call in message['tool_calls'] or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}
{%- if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"""


def model_with(folder: Path, template: str = TEMPLATE) -> Path:
    """A copy of the shipped model in a folder, with another chat template."""
    shutil.copytree(TINY, folder, dirs_exist_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def load_with(folder: Path, **more: object) -> LLM:
    """That model on one CPU thread."""
    return load_tiny(model=str(folder), **more)


@contextmanager
def saying(llm: LLM, text: str) -> Iterator[list[str]]:
    """Every answer is `text`, token by token, then its end. Yields a list that gets the text of each prompt."""
    tokenizer, prompts, sample = llm.tokenizer, [], Sampler.sample
    script = [*tokenizer.encode(text, add_special_tokens=False), *tokenizer.eos_token_ids]

    def scripted(self, logits, prompt_ids, generated_ids):
        if not generated_ids:
            prompts.append(tokenizer.decode(prompt_ids, skip_special_tokens=False))
        return SampledToken(script[min(len(generated_ids), len(script) - 1)])

    Sampler.sample = scripted
    try:
        yield prompts
    finally:
        Sampler.sample = sample
