"""A model's name to a local path: a directory or GGUF file as it is, or a repository of the hub, downloaded."""

import re
from fnmatch import fnmatch
from pathlib import Path

from hetero_attn.checkpoints.gguf.parts import first_part, model_files
from hetero_attn.errors import CheckpointError

# Weights in safetensors and what config and tokenizer need; never pickles, code, or a second copy of the weights in the
# publisher's own format (consolidated.safetensors, original/).
_WANTED = ("*.json", "model.safetensors", "model-*.safetensors", "tokenizer.model", "*.tiktoken", "*.jinja", "*.txt")
_BESIDE_GGUF = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_UNWANTED = ("*/*",)
_REPOSITORY = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?")


def resolve_model(name: str | Path, file: str | None = None) -> Path:
    """The local path of a model, downloading it first when `name` is a hub id.

    Args:
        name: a directory, a GGUF file (of several parts any one), or a hub id such as "Qwen/Qwen3-0.6B". A directory of
            that name wins. The hub's own variables (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE) apply; a repository that is
            already cached needs no network.
        file: which GGUF file of a directory or repository, a name with wildcards such as "*Q4_K_M*".

    Returns:
        The directory of a checkpoint in safetensors, or the first GGUF file of a model.

    Raises:
        CheckpointError: neither a directory nor a file nor a hub id that can be downloaded; no GGUF file, or several,
            of that pattern.
    """
    try:
        path = Path(name).expanduser()
        is_folder = bool(str(name)) and path.is_dir()
    except (RuntimeError, OSError, ValueError) as error:  # no home for "~", a name too long, a zero byte in it
        raise CheckpointError(f"{str(name)[:200]!r}: no directory and no hub id can be called so ({error})") from None
    if is_folder:
        return _in_directory(path, file)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is a file, expected a model directory or a .gguf file")
        return first_part(path)
    if not _REPOSITORY.fullmatch(str(name)) or str(name).startswith("."):
        raise CheckpointError(f"{name}: no such directory, and no hub id either (those look like owner/model)")
    return _in_directory(_download(str(name), file), file)


def _in_directory(directory: Path, file: str | None) -> Path:
    """The directory itself where it holds a checkpoint in safetensors and no GGUF file is asked for, else that file."""
    if file is None and ((directory / "config.json").exists() or not any(directory.glob("*.gguf"))):
        return directory
    models = model_files(directory)
    found = [path for path in models if file is None or fnmatch(path.name, file)]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(path.name for path in (found or models)[:10]) or "no .gguf file"
    if file is None:
        raise CheckpointError(f"{directory}: several GGUF models; say which by file=: {listed}")
    what = "several GGUF models match" if found else "no GGUF model matches"
    raise CheckpointError(f"{directory}: {what} file={file!r}; there are: {listed}")


def _download(repository: str, file: str | None) -> Path:
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            repository, allow_patterns=_WANTED if file is None else (*_BESIDE_GGUF, file), ignore_patterns=_UNWANTED
        )
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
