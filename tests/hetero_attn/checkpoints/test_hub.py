"""resolve_model: local directories first, then the hub; nothing here touches the network."""

from fnmatch import fnmatch

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from hetero_attn.checkpoints.gguf.choose import choose_model
from hetero_attn.checkpoints.hub import resolve_model, resolve_tokenizer
from hetero_attn.checkpoints.sources import is_gguf
from hetero_attn.errors import CheckpointError


@pytest.fixture
def hub(monkeypatch):
    """Stands in for snapshot_download: records its calls, and raises `hub.error` when that is set."""

    class Hub:
        def __init__(self):
            self.calls, self.error, self.names = [], None, ["config.json", "model.safetensors"]

        def download(self, repository, **options):
            self.calls.append((repository, options))
            if self.error is not None:
                raise self.error
            return "snapshot"

        def list_repo_files(self, repository):
            if self.names is None:
                raise RuntimeError("no network")
            return self.names

    fake = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
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


def test_a_gguf_file_of_another_name_is_one(tmp_path):
    """Ollama's files, which are called by their hashes, were refused as no .gguf file."""
    blob = tmp_path / "sha256-0123"
    blob.write_bytes(b"GGUF" + bytes(60))

    assert resolve_model(blob) == blob
    assert is_gguf(blob)


def test_a_missing_gguf_file_is_no_hub_id(tmp_path, monkeypatch, hub):
    """The hub was asked for a repository of that name."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="m.gguf: no such file; no GGUF file is there either"):
        resolve_model("m.gguf")
    (tmp_path / "m-Q8_0.gguf").touch()

    with pytest.raises(CheckpointError, match=r"m\.gguf: no such file; GGUF files there: m-Q8_0\.gguf"):
        resolve_model("m.gguf")
    assert [] == hub.calls


def test_a_pattern_that_a_file_does_not_match_is_refused(tmp_path):
    """--gguf beside a file was ignored: another model was run than asked for."""
    (tmp_path / "m-Q4_1.gguf").touch()

    assert resolve_model(tmp_path / "m-Q4_1.gguf", "q4_1") == tmp_path / "m-Q4_1.gguf"
    with pytest.raises(CheckpointError, match=r"no GGUF model matches file='Q8_0'; there are: m-Q4_1\.gguf"):
        resolve_model(tmp_path / "m-Q4_1.gguf", "Q8_0")


@pytest.mark.parametrize("names", [["m.gguf.part00", "m.gguf.part01"], ["m.gguf-split-a"], ["m.gguf.part1of2"]])
def test_pieces_cut_by_bytes_are_named_with_how_to_join_them(tmp_path, names):
    """config.json was asked for."""
    for name in names:
        (tmp_path / name).touch()

    for path in (tmp_path, tmp_path / names[0]):
        with pytest.raises(CheckpointError, match=r"piece of a GGUF file.*cat m\.gguf\?\* > m\.gguf"):
            resolve_model(path)


def test_a_folder_of_a_folder_with_one_gguf_model_is_that(tmp_path):
    """It was found only with a pattern."""
    (tmp_path / "Q4_K_M").mkdir()
    (tmp_path / "Q4_K_M" / "m.gguf").touch()

    assert resolve_model(tmp_path) == tmp_path / "Q4_K_M" / "m.gguf"


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


NAMES = [
    "README.md",
    "mmproj-F16.gguf",
    "m-mmproj-BF16.gguf",
    "imatrix_m.gguf",
    "m-Q4_K_M.gguf",
    "m-Q4_K_S.gguf",
    "m-Q8_0.gguf",
    "m-Q8_0-UD.gguf",
    "BF16/m-BF16-00001-of-00002.gguf",
    "BF16/m-BF16-00002-of-00002.gguf",
]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*Q4_K_M*", ["m-Q4_K_M.gguf"]),
        ("Q4_K_M", ["m-Q4_K_M.gguf"]),
        ("q4_k_s", ["m-Q4_K_S.gguf"]),
        ("m-Q8_0", ["m-Q8_0.gguf"]),
        ("m-Q8_0.gguf", ["m-Q8_0.gguf"]),
        ("*Q8_0.gguf", ["m-Q8_0.gguf"]),
        ("BF16", ["BF16/m-BF16-00001-of-00002.gguf", "BF16/m-BF16-00002-of-00002.gguf"]),
        ("*-00002-of-00002.gguf", ["BF16/m-BF16-00001-of-00002.gguf", "BF16/m-BF16-00002-of-00002.gguf"]),
    ],
)
def test_a_pattern_names_one_model_with_all_its_parts(pattern, found):
    assert choose_model("here", NAMES, pattern) == found


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (None, r"here: several GGUF models; say which by file=.*--gguf on the command line\): BF16/m-BF16-00001.*Q8_0"),
        ("*Q4_K*", r"several GGUF models match file='\*Q4_K\*'; there are: m-Q4_K_M.gguf, m-Q4_K_S.gguf$"),
        ("Q2_K", r"no GGUF model matches file='Q2_K'; there are: .*m-Q4_K_M.gguf"),
        ("mmproj", "no GGUF model matches"),
    ],
)
def test_none_or_several_are_refused_with_what_there_is(pattern, words):
    with pytest.raises(CheckpointError, match=words):
        choose_model("here", NAMES, pattern)


def test_of_a_repository_only_the_files_of_that_model_are_fetched(hub):
    hub.names = NAMES

    assert str(resolve_model("owner/model", "bf16")) == "snapshot/BF16/m-BF16-00001-of-00002.gguf"
    ((_, options),) = hub.calls
    wanted = [name for name in NAMES if any(fnmatch(name, pattern) for pattern in options["allow_patterns"])]
    assert wanted == ["BF16/m-BF16-00001-of-00002.gguf", "BF16/m-BF16-00002-of-00002.gguf"]


def test_a_pattern_of_several_fetches_nothing(hub):
    hub.names = NAMES

    with pytest.raises(CheckpointError, match="several GGUF models match"):
        resolve_model("owner/model", "*Q4_K*")
    assert hub.calls == []


def test_a_repository_of_gguf_files_alone_is_its_one_model_or_lists_them(hub):
    hub.names = ["m-Q4_K_M.gguf", "mmproj.gguf"]
    assert str(resolve_model("owner/model")) == "snapshot/m-Q4_K_M.gguf"
    hub.names = NAMES

    with pytest.raises(CheckpointError, match="owner/model: several GGUF models; say which"):
        resolve_model("owner/model")


def test_without_a_network_what_was_fetched_before_counts(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub.names = None
    (tmp_path / "snapshot" / "BF16").mkdir(parents=True)
    (tmp_path / "snapshot" / "BF16" / "m-BF16.gguf").touch()

    assert str(resolve_model("owner/model", "bf16")) == "snapshot/BF16/m-BF16.gguf"
    assert hub.calls[0][1]["local_files_only"]
    with pytest.raises(CheckpointError, match=r"no GGUF model matches file='q8_0'; there are: BF16/m-BF16.gguf"):
        resolve_model("owner/model", "q8_0")


@pytest.mark.parametrize("name", ["~nobody-of-this-name/model", "a/" + "b" * 5000, "a\0b"])
def test_a_name_that_no_path_can_have_is_refused(hub, name):
    hub.error = ValueError("no such repository")
    for resolve in (resolve_model, resolve_tokenizer):
        with pytest.raises(CheckpointError):
            resolve(name)


def test_a_tokenizer_is_a_folder_a_file_or_a_hub_id(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "tokenizer.json", tmp_path / "m.gguf", tmp_path / "snapshot" / "tokenizer.model"):
        path.touch()

    assert resolve_tokenizer(tmp_path) == resolve_tokenizer(tmp_path / "tokenizer.json") == tmp_path
    assert resolve_tokenizer(tmp_path / "m.gguf") == tmp_path / "m.gguf"
    assert str(resolve_tokenizer("owner/model")) == "snapshot"
    assert not any(fnmatch("model.safetensors", pattern) for pattern in hub.calls[0][1]["allow_patterns"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no tokenizer is there; give a folder with tokenizer.json"):
        resolve_tokenizer(tmp_path / "empty")
