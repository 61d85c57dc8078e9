"""Configs and headers of quantised checkpoints, changed at random: an error of ours or modules, never anything else."""

import copy
import json
import random

import pytest
import torch

from hetero_attn.checkpoints.quantised.checkpoint import _RAW_DTYPES
from hetero_attn.checkpoints.quantised.find import find_modules
from hetero_attn.checkpoints.quantised.scheme import read_scheme
from hetero_attn.errors import HeteroError
from tests.support.quantised import scaled_models as writers
from tests.support.quantised.int4_data import random_groups
from tests.support.quantised.int4_models import awq, awq_config, compressed, gptq, gptq_config
from tests.support.quantised.int4_models import compressed_config as int4_config
from tests.support.quantised.scaled_cases import BLOCKS, BNB, MIXED, W8A8

MUTATIONS = 1500
SAFETENSORS = {value: key for key, value in _RAW_DTYPES.items() if key != "F8_E8M0"}
STRANGE = (
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    8,
    1 << 40,
    0.5,
    "",
    "x",
    "Linear",
    [],
    [128],
    [0, 0],
    {},
    {"a": {}},
    "128x0",
)


def seeds():
    """(config, tensors of a model of one linear) of every kind."""
    generator = torch.Generator().manual_seed(0)
    groups = random_groups(64, 256, 64)
    groups = groups._replace(zeros=groups.zeros.clamp(1, 15))
    scaled = (
        (BLOCKS, writers.fp8_blocks(128, 128)),
        (W8A8, writers.int8_channel),
        (MIXED, writers.mxfp4),
        (MIXED, writers.int8_packed(64, symmetric=False)),
        (MIXED, writers.nvfp4(model_opt=False)),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, writers.nvfp4(model_opt=True)),
        (BNB, writers.nf4(nested=True)),
    )
    found = [(config, write(64, 256, generator)[0]) for config, write in scaled]
    found += [(gptq_config(64), gptq(groups, 64)), (awq_config(64), awq(groups, 64))]
    return [*found, (int4_config(64), compressed(groups, 64))]


def changed_config(config, draw: random.Random):
    """One value somewhere in it replaced, or a key taken away."""
    config = copy.deepcopy(config)
    inside = config
    while True:
        key = draw.choice(list(inside))
        deeper = inside[key]
        if isinstance(deeper, dict) and deeper and draw.random() < 0.8:
            inside = deeper
            continue
        if draw.random() < 0.2:
            del inside[key]
        else:
            inside[key] = draw.choice(STRANGE)
        return config


def changed_tensors(tensors, draw: random.Random):
    """One tensor taken away, or given another dtype, shape or name."""
    tensors, name = dict(tensors), draw.choice(list(tensors))
    tensor = tensors.pop(name)
    kind = draw.randrange(4)
    if kind == 1:
        dtype = getattr(torch, draw.choice(list(SAFETENSORS)))
        tensors[name] = torch.zeros(tensor.shape, dtype=dtype)
    if kind == 2:
        shape = list(tensor.shape) or [1]
        shape[draw.randrange(len(shape))] = draw.choice((0, 1, 3, 64, 256))
        tensors[name] = torch.zeros(shape[: draw.randrange(3)], dtype=tensor.dtype)
    if kind == 3:
        tensors[draw.choice(list(tensors) or ["weight"])] = tensor
    return tensors


@pytest.mark.parametrize("seed", range(2))
def test_a_changed_model_is_refused_or_read(tmp_path, seed):
    draw, kinds, refused, read = random.Random(seed), seeds(), 0, 0
    for _ in range(MUTATIONS // 2):
        config, tensors = draw.choice(kinds)
        if draw.random() < 0.5:
            config = changed_config(config, draw)
        else:
            tensors = changed_tensors(tensors, draw)
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
        named = {f"model.layers.0.mlp.up_proj.{part}": tensor for part, tensor in tensors.items()}
        shapes = {
            name: (SAFETENSORS[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
            for name, tensor in named.items()
        }
        try:
            scheme = read_scheme(tmp_path)
            modules = {} if scheme is None else find_modules(scheme, shapes, named.__getitem__, "here")
            for module in modules.values():
                dtype = torch.float32 if module.kind is None else torch.uint8
                out = torch.empty(min(16, module.out_features), module.row_bytes // dtype.itemsize, dtype=dtype)
                module.rows(named.__getitem__, "here")(0, out.shape[0], out)
            read += 1
        except HeteroError as error:
            assert str(error)
            refused += 1

    assert refused > MUTATIONS // 10 and read > MUTATIONS // 50
