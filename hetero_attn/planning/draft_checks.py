"""Whether what is to draft for a model can, and what that model keeps for a head that reads its hidden states."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hetero_attn.checkpoints.gguf.choose import SeveralModelsError
from hetero_attn.checkpoints.gguf.headers import KnownHeaders
from hetero_attn.checkpoints.hub import resolve_model
from hetero_attn.checkpoints.sources import read_config
from hetero_attn.errors import CheckpointError, ConfigError, UnsupportedModelError
from hetero_attn.planning.options import LoadOptions
from hetero_attn.spec.config import ModelConfig
from placement.policy.fields import SPECULATIONS

NAMED = "speculate: the drafter"  # how an error about it begins
READING = (CheckpointError, UnsupportedModelError, ConfigError)  # what reading a model's files may raise


@contextmanager
def named_as_drafter(wish: str) -> Iterator[None]:
    """Around reading what drafts: an error about its files says that they are those of the drafter."""
    name = Path(wish).name or wish
    try:
        yield
    except SeveralModelsError as error:
        raise CheckpointError(
            f"{NAMED} {name}, where several GGUF models are; give the path of one of them: {error.listed}"
        ) from error
    except READING as error:
        if str(error).startswith(NAMED):
            raise
        kind = next(kind for kind in READING if isinstance(error, kind))
        raise kind(f"{NAMED} {name}: {error}") from error


def taps_for_head(wish: str, options: LoadOptions, config: ModelConfig, known: KnownHeaders) -> tuple[int, ...]:
    """Before which layers of a model the residual stream is kept, because `wish` is a head that reads it; none for any
    other drafter. known: as for `open_source`. Raises UnsupportedModelError for a head of another model."""
    if wish in SPECULATIONS:
        return ()
    with named_as_drafter(wish):
        head = read_config(resolve_model(wish, None), known)
    if head.eagle is None:
        return ()
    if reasons := list(_misfits(head, config)):
        raise UnsupportedModelError(
            f"{NAMED} {Path(wish).name}, a head that cannot draft for {Path(options.model).name}: "
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


def other_vocabulary(name: str, target: str, why: str) -> UnsupportedModelError:
    """The error about a draft model whose tokens are not those of the model that it is to draft for."""
    return UnsupportedModelError(
        f"{NAMED} {name}, which cannot draft for {target}: {why}; give a model of the same vocabulary"
    )


def sizes_differ(own_size: int, target_size: int) -> str:
    """Why a drafter of another number of tokens cannot draft."""
    return f"vocabularies have {own_size} and {target_size} tokens"


def _misfits(head: ModelConfig, config: ModelConfig) -> Iterator[str]:
    eagle = head.eagle
    if head.vocab_size != config.vocab_size:
        yield sizes_differ(head.vocab_size, config.vocab_size)
    if eagle.target_hidden_size != config.hidden_size:
        yield f"it reads hidden states of {eagle.target_hidden_size} numbers, and the model's have {config.hidden_size}"
    elif not eagle.owns_embedding and head.hidden_size != config.hidden_size:
        yield f"it has no embedding of its own, and those of the model have {config.hidden_size} numbers, not " + str(
            head.hidden_size
        )
    if wrong := [layer for layer in eagle.tapped(config.num_layers) if not 0 <= layer <= config.num_layers]:
        yield f"it reads before layer {wrong[0]}, and the model has {config.num_layers}"
