"""Where a source says that rows lie in a file there are just the bytes that it reads; it says nothing of others."""

import pytest
import torch

from hetero_attn.checkpoints.sources import open_source
from tests.support.models.gguf_models import make_gguf
from tests.support.models.toy import make_checkpoint, make_family_checkpoint


def found_in(path):
    """Names of the tensors whose rows [16, 48) lie in one piece, each of which is compared with what is read."""
    found = set()
    with open_source(path) as source:
        for name in source.names:
            shape = source.shape(name)
            extent = source.extent(name, 16, 48) if len(shape) == 2 and shape[0] >= 48 else None
            if extent is not None:
                rows = source.read(name, slice(16, 48)).contiguous().view(torch.uint8)
                content = extent.file.path.read_bytes()[extent.offset : extent.offset + extent.nbytes]
                assert content == rows.numpy().tobytes(), name
                found.add(name.rpartition("layers.0.")[2])
    return found


def test_rows_of_safetensors(tmp_path):
    found = found_in(make_checkpoint(tmp_path, layers=1))

    assert {"self_attn.q_proj.weight", "mlp.down_proj.weight", "model.embed_tokens.weight"} <= found


@pytest.mark.parametrize(("family", "apart"), [("llama", {"q", "k"}), ("qwen3", set())])
def test_rows_of_gguf_but_those_that_are_turned(tmp_path, family, apart):
    path, _ = make_gguf(tmp_path, {}, family=family)
    found = found_in(path)

    assert "mlp.down_proj.weight" in found
    assert apart == {name for name in "qk" if f"self_attn.{name}_proj.weight" not in found}


@pytest.mark.parametrize("family", ["phi3", "mixtral", "gpt_oss"])
def test_rows_of_fused_and_renamed_tensors(tmp_path, family):
    """Parts of tensors that hold several, and experts; columns are not rows."""
    found = found_in(make_family_checkpoint(tmp_path, family))

    assert any("proj" in name for name in found)
    assert not any("experts" in name for name in found) or family == "mixtral"
