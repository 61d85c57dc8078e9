"""A model's name to a local path: a directory or GGUF file as it is, or a repository of the hub, downloaded."""

import glob
import re
from pathlib import Path

from hetero_attn.checkpoints.files import some
from hetero_attn.checkpoints.gguf.choose import SUFFIX, choose_model, expect_whole, models_of
from hetero_attn.checkpoints.gguf.file import begins_as_gguf
from hetero_attn.checkpoints.gguf.parts import first_name, first_part
from hetero_attn.errors import CheckpointError

# Weights in safetensors and what config and tokenizer need; never pickles, code, or a second copy of the weights in the
# publisher's own format (consolidated.safetensors, original/).
_WANTED = ("*.json", "model.safetensors", "model-*.safetensors", "tokenizer.model", "*.tiktoken", "*.jinja", "*.txt")
_BESIDE_GGUF = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
_OF_TOKENIZER = (
    "tokenizer*",
    "*.tiktoken",
    "*.jinja",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_UNWANTED = ("*/*",)
_REPOSITORY = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?")


def resolve_model(name: str | Path, file: str | None = None) -> Path:
    """The local path of a model, downloading it first when `name` is a hub id.

    Args:
        name: a directory, a GGUF file of any name (of several parts any one), or a hub id such as "Qwen/Qwen3-0.6B". A
            directory of that name wins. The hub's own variables (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE) apply; a repository
            that is already cached needs no network.
        file: which GGUF file of a directory or repository: a name, one with wildcards such as "*Q4_K_M*", or a part
            of it. Folders inside are looked into as well; of several parts all are fetched.

    Returns:
        The directory of a checkpoint in safetensors, or the first GGUF file of a model.

    Raises:
        CheckpointError: neither a directory nor a file nor a hub id that can be downloaded; no GGUF file, or several,
            of that pattern.
    """
    path = _path_of(name)
    if str(name) and path.is_dir():
        return _in_directory(path, file)
    if path.is_file():
        return _of_file(path, file)
    if path.suffix == SUFFIX and path.parent.is_dir():
        raise CheckpointError(f"{path}: no such file; {_beside(path.parent)}")
    if not _REPOSITORY.fullmatch(str(name)) or str(name).startswith("."):
        raise CheckpointError(f"{name}: no such directory, and no hub id either (those look like owner/model)")
    return _of_repository(str(name), file)


def resolve_tokenizer(name: str | Path) -> Path:
    """The folder or GGUF file that a tokenizer is taken from, downloaded first where `name` is a hub id.

    name: a folder with tokenizer files, one of these files, a GGUF file, or a hub id, of which only these files are
    fetched. Raises CheckpointError for anything else.
    """
    path = _path_of(name)
    if path.suffix == ".gguf" and path.is_file():
        return first_part(path)
    if not path.exists() and _REPOSITORY.fullmatch(str(name)) and not str(name).startswith("."):
        path = _fetched(str(name), _OF_TOKENIZER, _UNWANTED)
    folder = path.parent if path.name in _TOKENIZER_FILES else path
    if not any((folder / each).is_file() for each in _TOKENIZER_FILES):
        raise CheckpointError(
            f"{name}: no tokenizer is there; give a folder with tokenizer.json, that file, a GGUF file or a hub id"
        )
    return folder


def _path_of(name: str | Path) -> Path:
    """The path of a name, which may be that of a repository; CheckpointError where it can be none."""
    try:
        path = Path(name).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (RuntimeError, OSError, ValueError) as error:  # no home for "~", a name too long, a zero byte in it
        raise CheckpointError(f"{str(name)[:200]!r}: no directory and no hub id can be called so ({error})") from None
    return path


def _of_file(path: Path, file: str | None) -> Path:
    """The first part of the model that a file is of, whatever its name: Ollama's files are called by their hashes."""
    expect_whole(str(path), [path.name])
    if path.suffix != SUFFIX and not begins_as_gguf(path):
        raise CheckpointError(f"{path} is a file, expected a model directory or a GGUF file")
    if file is not None:
        choose_model(str(path), [first_name(path.name)], file)
    return first_part(path)


def _in_directory(directory: Path, file: str | None) -> Path:
    """The directory itself where it holds a checkpoint in safetensors and no GGUF file is asked for, else that file."""
    if file is None and (directory / "config.json").exists():
        return directory
    names = _gguf_names(directory)
    if not names:
        expect_whole(str(directory), sorted(path.name for path in directory.iterdir()))
    if file is None and not names:
        return directory
    return directory / choose_model(str(directory), names, file)[0]


def _gguf_names(directory: Path) -> list[str]:
    """The GGUF files of a directory, and of the folders in it."""
    paths = (*directory.glob("*.gguf"), *directory.glob("*/*.gguf"))
    return [path.relative_to(directory).as_posix() for path in paths]


def _beside(directory: Path) -> str:
    """What GGUF models a directory has, in words."""
    names = sorted(models_of(path.name for path in directory.glob("*.gguf")))
    return f"GGUF files there: {some(names)}" if names else "no GGUF file is there either; check the path"


def _of_repository(repository: str, file: str | None) -> Path:
    """A repository's safetensors, or where it has none, or a file is asked for, one of its GGUF models."""
    folder = None if file else _fetched(repository, _WANTED, _UNWANTED)
    if folder is not None and any(folder.glob("*.safetensors")):
        return folder
    names = _listed(repository)
    if names is None:  # no network: what was fetched before
        return _in_directory(folder or _fetched(repository, ("*.gguf",), kept=True), file)
    if folder is not None and not any(name.endswith(".gguf") for name in names):
        return folder
    parts = choose_model(repository, names, file)
    return _fetched(repository, (*_BESIDE_GGUF, *map(glob.escape, parts))) / parts[0]


def _listed(repository: str) -> list[str] | None:
    """The files of a repository; None where the hub does not answer."""
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().list_repo_files(repository)
    except Exception:  # whatever the network stack raises; the download that follows names it
        return None


def _fetched(
    repository: str, wanted: tuple[str, ...], unwanted: tuple[str, ...] | None = None, kept: bool = False
) -> Path:
    """The local folder of a repository's files of some patterns. kept: only what was fetched before."""
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            repository, allow_patterns=wanted, ignore_patterns=unwanted, local_files_only=kept
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
