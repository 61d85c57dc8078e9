"""The shipped model, small, as it is and as it was written."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from hetero_attn.tools.quantize.write import quantize
from tests.support.models.toy import edit_json
from tests.support.quantised.quantising import TINY


@pytest.fixture(scope="session")
def halved(tmp_path_factory):
    """The shipped checkpoint without the last two of its four layers."""
    path = shutil.copytree(TINY, tmp_path_factory.mktemp("halved") / "tiny")
    edit_json(path / "config.json", num_hidden_layers=2)
    tensors = load_file(path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.2." not in name and ".layers.3." not in name}
    save_file(kept, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="session")
def written(halved, tmp_path_factory):
    """That checkpoint in Q8_0."""
    out = tmp_path_factory.mktemp("quantized") / "tiny.gguf"
    quantize(halved, out, "q8", threads=2)
    return out
