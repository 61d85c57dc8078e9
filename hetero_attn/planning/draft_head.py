"""Whether a head that drafts fits the model that it is to draft for, and what that model keeps for it."""

from collections.abc import Iterator
from pathlib import Path

from hetero_attn.checkpoints.hub import resolve_model
from hetero_attn.checkpoints.sources import read_config
from hetero_attn.errors import UnsupportedModelError
from hetero_attn.planning.options import LoadOptions
from hetero_attn.spec.config import ModelConfig
from placement.policy.fields import SPECULATIONS


def taps_for_head(wish: str, options: LoadOptions, config: ModelConfig) -> tuple[int, ...]:
    """Before which layers of a model the residual stream is kept, because `wish` is a head that reads it; none for any
    other drafter. Raises UnsupportedModelError for a head of another model."""
    if wish in SPECULATIONS:
        return ()
    head = read_config(resolve_model(wish, None))
    if head.eagle is None:
        return ()
    if reasons := list(_misfits(head, config)):
        raise UnsupportedModelError(
            f"speculate names {Path(wish).name}, a head that cannot draft for {Path(options.model).name}: "
            f"{'; '.join(reasons)}. Give a head that was trained for this very model"
        )
    return head.eagle.tapped(config.num_layers)


def refuse_head(options: LoadOptions, config: ModelConfig) -> None:
    """Raise UnsupportedModelError for a head in the place of a model."""
    if config.eagle is not None:
        raise UnsupportedModelError(
            f"{options.model} is a head that drafts for a larger model and says nothing by itself; load that model, "
            f"with speculate={str(options.model)!r}"
        )


def _misfits(head: ModelConfig, config: ModelConfig) -> Iterator[str]:
    eagle = head.eagle
    if head.vocab_size != config.vocab_size:
        yield f"vocabularies have {head.vocab_size} and {config.vocab_size} tokens"
    if eagle.target_hidden_size != config.hidden_size:
        yield f"it reads hidden states of {eagle.target_hidden_size} numbers, and the model's have {config.hidden_size}"
    elif not eagle.owns_embedding and head.hidden_size != config.hidden_size:
        yield f"it has no embedding of its own, and those of the model have {config.hidden_size} numbers, not " + str(
            head.hidden_size
        )
    if wrong := [layer for layer in eagle.tapped(config.num_layers) if not 0 <= layer <= config.num_layers]:
        yield f"it reads before layer {wrong[0]}, and the model has {config.num_layers}"
