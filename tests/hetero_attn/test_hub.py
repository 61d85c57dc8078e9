"""resolve_model: local directories first, then the hub; nothing here touches the network."""

from fnmatch import fnmatch

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from hetero_attn.checkpoints.hub import resolve_model
from hetero_attn.errors import CheckpointError


@pytest.fixture
def hub(monkeypatch):
    """Stands in for snapshot_download: records its calls, and raises `hub.error` when that is set."""

    class Hub:
        def __init__(self):
            self.calls, self.error = [], None

        def download(self, repository, **options):
            self.calls.append((repository, options))
            if self.error is not None:
                raise self.error
            return "snapshot"

    fake = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.download)
    return fake


def test_a_directory_is_taken_as_it_is(tmp_path, monkeypatch, hub):
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    assert tmp_path == resolve_model(tmp_path)
    assert "owner/model" == str(resolve_model("owner/model"))
    assert [] == hub.calls


def test_a_hub_id_downloads_safetensors_and_never_code(hub):
    assert "snapshot" == str(resolve_model("owner/model-1.5B"))

    ((repository, options),) = hub.calls
    assert "owner/model-1.5B" == repository

    def wanted(name):
        allowed = any(fnmatch(name, pattern) for pattern in options["allow_patterns"])
        return allowed and not any(fnmatch(name, pattern) for pattern in options["ignore_patterns"])

    needed = ["config.json", "generation_config.json", "model.safetensors", "model-00001-of-00002.safetensors"]
    needed += ["model.safetensors.index.json", "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja"]
    unwanted = [
        "pytorch_model.bin",
        "modeling_x.py",
        "consolidated.safetensors",
        "original/params.json",
        "x.gguf",
        "a.pth",
    ]
    assert needed == [name for name in needed if wanted(name)]
    assert [] == [name for name in unwanted if wanted(name)]


def test_a_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()

    with pytest.raises(CheckpointError, match="is a file, expected a model directory"):
        resolve_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["./missing", "/no/such/dir", "a/b/c", "a b", "", "../x", "~/nothing-here"])
def test_what_can_be_no_hub_id_is_not_looked_up(tmp_path, monkeypatch, hub, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    with pytest.raises(CheckpointError, match="no such directory, and no hub id either"):
        resolve_model(name)
    assert [] == hub.calls


def test_failing_downloads_are_named(hub):
    hub.error = LocalEntryNotFoundError(
        "Cannot find an appropriate cached snapshot folder,\n outgoing traffic disabled"
    )

    with pytest.raises(CheckpointError) as caught:
        resolve_model("owner/model")

    assert 3 == caught.value.exit_code
    for part in ["owner/model", "cannot be fetched", "cached snapshot folder, outgoing traffic disabled", "connection"]:
        assert part in str(caught.value)


def test_errors_of_any_network_library_are_named(hub):
    hub.error = RuntimeError("read timed out")

    with pytest.raises(CheckpointError, match="RuntimeError: read timed out"):
        resolve_model("owner/model")


@pytest.mark.parametrize(
    ("kind", "part"), [("GatedRepoError", "is gated"), ("RepositoryNotFoundError", "neither a local")]
)
def test_refusals_of_the_hub_are_told_apart(hub, kind, part):
    error_class = getattr(huggingface_hub.errors, kind)
    hub.error = error_class.__new__(error_class)

    with pytest.raises(CheckpointError, match=part):
        resolve_model("owner/model")


def test_offline_without_a_cache(tmp_path, monkeypatch):
    """HF_HUB_OFFLINE is read by huggingface_hub when it is imported; the constant is what it read."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    with pytest.raises(CheckpointError, match="LocalEntryNotFoundError"):
        resolve_model("owner/model")
