"""A model's name to a local directory: a directory as it is, or a repository of the Hugging Face hub, downloaded."""

import re
from pathlib import Path

from hetero_attn.errors import CheckpointError

# Weights in safetensors and what config and tokenizer need; never pickles, code, or a second copy of the weights in the
# publisher's own format (consolidated.safetensors, original/).
_WANTED = ("*.json", "model.safetensors", "model-*.safetensors", "tokenizer.model", "*.tiktoken", "*.jinja", "*.txt")
_UNWANTED = ("*/*",)
_REPOSITORY = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?")


def resolve_model(name: str | Path) -> Path:
    """The local directory of a model, downloading it first when `name` is a hub id.

    Args:
        name: a directory, or a hub id such as "Qwen/Qwen3-0.6B". A directory of that name wins. The hub's own variables
            (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE) apply; a repository that is already cached needs no network.

    Raises:
        CheckpointError: neither a directory nor a hub id that can be downloaded.
    """
    path = Path(name).expanduser()
    if str(name) and path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(f"{path} is a file, expected a model directory; give the directory it is in")
    if not _REPOSITORY.fullmatch(str(name)) or str(name).startswith("."):
        raise CheckpointError(f"{name}: no such directory, and no hub id either (those look like owner/model)")
    return _download(str(name))


def _download(repository: str) -> Path:
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(repository, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
    except huggingface_hub.errors.GatedRepoError:
        raise CheckpointError(
            f"{repository}: this hub repository is gated; ask for access on its page, then log in with `hf auth login`"
        ) from None
    except huggingface_hub.errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{repository}: neither a local directory nor a hub repository; check the name (a private repository "
            "needs `hf auth login`)"
        ) from None
    # The network stack below raises httpx errors in huggingface_hub 1.x and httpx2 errors in 2.x: no common base.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{repository}: no such local directory, and it cannot be fetched from the hub ({type(error).__name__}: "
            f"{reason}); check the name and the connection, or download it elsewhere and give its directory"
        ) from error
    return Path(folder)
