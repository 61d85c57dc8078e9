"""Gated DeltaNet from GGUF files: every tensor and every answer is that of the same values in safetensors."""

import pytest
import torch

from hetero_attn import LLM
from hetero_attn.checkpoints.sources import open_source, read_config
from hetero_attn.errors import CheckpointError, ConfigError
from hetero_attn.models.decoder import decoder
from hetero_attn.spec.config import ModelConfig
from tests.support.models.delta_gguf import ARCHITECTURES, delta_gguf
from tests.support.models.gguf_data import dequantised
from tests.support.models.gguf_models import TYPES
from tests.support.models.moe import moe_logits
from tests.support.models.runtime import nmse

EXACT = 1e-9
TOKENS = torch.randint(307, (24,), generator=torch.Generator().manual_seed(4)).tolist()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def files(request, tmp_path_factory):
    """(family, GGUF file, directory)."""
    return request.param, *delta_gguf(tmp_path_factory.mktemp(request.param), request.param)


def logits_of(path, **more):
    with LLM(path, device="cpu", max_context=64, progress=False, **more) as llm:
        return llm.logits(TOKENS)


def test_every_tensor_is_the_one_of_the_directory(files):
    """To the bit, rows that come in turn and heads in another order included; ssm_out keeps the order of its inputs."""
    _, file, plain = files
    config, expected = read_config(file), ModelConfig.from_dir(plain)
    delta = config.delta
    with open_source(file) as source, open_source(plain) as other:
        assert source.check(decoder(config)) == []
        for name in decoder(config).tensors:
            values, kind = source.read(name), source.source_type(name)
            values = values if kind is None else dequantised(TYPES[kind], values)
            wanted = other.read(name).view(values.shape)
            if name.endswith("A_log"):
                wanted = -wanted.exp()
            elif name.endswith("norm.weight") and "linear_attn" not in name:
                wanted = wanted + 1.0
            elif name.endswith("out_proj.weight") and delta.is_tiled:
                by_head = wanted.unflatten(1, (delta.key_heads, delta.values_per_key, -1))
                wanted = by_head.transpose(1, 2).flatten(1)
            assert torch.equal(values, wanted), name
            middle = source.read(name, slice(3, 9))
            whole = source.read(name)[3:9]
            assert torch.equal(middle, whole), name
    assert (config.delta.layers, config.rope.rotary_dim) == (expected.delta.layers, expected.rope.rotary_dim)
    assert config.experts == expected.experts


def test_logits_are_those_of_the_directory_and_of_transformers(files):
    """To the bit where the inputs of every linear are in one order."""
    family, file, plain = files
    found, expected = logits_of(file, dtype="fp32"), logits_of(plain, dtype="fp32")

    assert nmse(found, expected) <= EXACT
    assert nmse(found, moe_logits(plain, TOKENS)) <= EXACT
    assert torch.equal(found, expected) == (family == "qwen3_next")


def test_codes_run_as_they_are_on_every_lane(files):
    """Against float32 within what rounding of activations to int8 explains, which three lanes do alike."""
    _, file, _ = files
    one = logits_of(file)
    with LLM(file, device="emulated", gpu_memory="600KiB", max_context=64, progress=False) as llm:
        lanes = llm.logits(TOKENS)
        assert any(linear.gpu_units for linear in llm.plan.linears)

    assert nmse(one, logits_of(file, dtype="fp32")) <= 3e-2
    assert nmse(lanes, one) <= 3e-2


def test_a_file_whose_heads_do_not_fit_is_refused(files, tmp_path):
    """Rows that are no whole groups, and counts that no model has, by the name of what is wrong."""
    family, _, _ = files
    file, _ = delta_gguf(tmp_path, family, says={"ssm.group_count": 3})
    with pytest.raises((CheckpointError, ConfigError), match="time_step_rank|ssm_ba|attn_q"):
        with open_source(file) as source:
            source.check(decoder(source.config))
