"""A weight format is added in one place: here, a toy of six bits that the package does not know.

What a real one has: a descriptor, a slow reading beside it, and the file type that it comes from. Everything else, the
sizes, the kernels of the CPU lane, the plan, the loader and the lanes, follows from the descriptor.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cpu_kernels.formats import FORMATS, SOURCE_TYPES
from cpu_kernels.formats.base import WeightFormat
from cpu_kernels.formats.gguf_types import GgufType
from gpu_kernels.forms.unpack import FORMS, Form
from hetero_attn.checkpoints.checkpoint import Checkpoint
from hetero_attn.engine import build
from hetero_attn.engine.build import build_engine
from hetero_attn.models.decoder import decoder
from hetero_attn.planning.settle import PlannedModel
from hetero_attn.spec.config import ModelConfig, tensor_names
from hetero_attn.spec.tensor_names import tensor_name
from hetero_attn.spec.weight_formats import WeightFormats
from hetero_attn.spec.workload import Sizes, build_workload
from placement.machine.hardware import HardwareProfile
from tests.support.models.runtime import cpu_plan, nmse, run_logits, uniform_plan
from tests.support.models.toy import make_checkpoint

DOWN = tensor_name("down", 1)
TOKENS = torch.randint(3, 260, (20,), generator=torch.Generator().manual_seed(4)).tolist()

# The format: codes 0..63 in the plane of six bits, times a scale, plus a minimum, of every 32 inputs.
TOY = WeightFormat(
    name="toy", plane="u6", header="SM32", header_lines=2, group_inputs=64, rounds_x_to="int8", like="q8"
)
READING = Form(6, 64, 2, "SM32")
# In a file: a float16 scale, a float16 minimum, then a byte a code.
FILE_TYPE = GgufType("TOY", -1, 32, 36, "toy")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    from cpu_kernels.linear.repacking.source_blocks import KERNEL_SOURCES, header_of_32

    def word(stage, k):
        return stage.word((k >> 3) * 36 + 4 + 4 * (k & 7))

    monkeypatch.setitem(FORMATS, "toy", TOY)
    monkeypatch.setitem(FORMS, "toy", READING)
    monkeypatch.setitem(SOURCE_TYPES, "TOY", FILE_TYPE)
    monkeypatch.setitem(KERNEL_SOURCES, "TOY", (word, header_of_32(36, 2)))


def coded(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(bytes of rows as the file has them, the numbers that they mean)."""
    blocks = rows.reshape(len(rows), -1, 32)
    minimum = blocks.min(-1, keepdims=True).astype(np.float16).astype(np.float32)
    scale = ((blocks.max(-1, keepdims=True) - minimum) / 63).astype(np.float16).astype(np.float32)
    codes = np.clip(np.round((blocks - minimum) / np.where(scale == 0, 1, scale)), 0, 63).astype(np.uint8)
    halves = np.concatenate([scale, minimum], -1).astype(np.float16).view(np.uint8)
    values = codes.astype(np.float32) * scale + minimum
    return np.concatenate([halves, codes], -1).reshape(len(rows), -1), values.reshape(rows.shape)


class ToyCheckpoint(Checkpoint):
    """A checkpoint one of whose tensors is stored in the toy's file type; is_read: as the numbers that it means."""

    is_read = False

    def source_type(self, name):
        return "TOY" if name == DOWN and not self.is_read else None

    def row_bytes(self, name):
        return FILE_TYPE.row_bytes(self.shape(name)[1]) if self.source_type(name) else super().row_bytes(name)

    def torch_dtype(self, name):
        if name == DOWN:
            return torch.float32 if self.is_read else torch.uint8
        return super().torch_dtype(name)

    def read(self, name, rows=None, out=None):
        if name != DOWN:
            return super().read(name, rows, out)
        with Checkpoint.open(self.path, tensor_names(self.path)) as plain:
            stored, values = coded(plain.read(name).float().numpy())
        return out.copy_(torch.from_numpy(values if self.is_read else stored)[rows])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("toy"), layers=2, intermediate=160)


def logits(path, monkeypatch, plan_of, wanted="toy", is_read=False):
    """Logits of a model with `down` of layer 1 in a format and bf16 everywhere else."""
    source = type("Source", (ToyCheckpoint,), {"is_read": is_read})
    monkeypatch.setattr(build, "open_source", lambda where, _: source.open(where, tensor_names(where)))
    config = ModelConfig.from_dir(path)
    formats = WeightFormats("bf16", "bf16", {DOWN: wanted})
    workload = build_workload(
        decoder(config, formats), "bf16", "toy", Sizes(max_context=32, max_batch=1, page_size=4, prefill_chunk=8)
    )
    plan = plan_of(workload)
    hardware = HardwareProfile.named("emulated")
    planned = PlannedModel(path, config, "bf16", plan.device, hardware, plan, formats=formats)
    engine = build_engine(planned)
    try:
        return run_logits(engine, TOKENS, 16)
    finally:
        engine.close()


def in_three(workload):
    return uniform_plan(workload, gpu=0.4, stream=0.3, gpu_kv_heads=1)


def test_a_format_added_here_runs_on_every_lane(path, monkeypatch):
    alone = logits(path, monkeypatch, cpu_plan)
    together = logits(path, monkeypatch, in_three)
    exact = logits(path, monkeypatch, cpu_plan, wanted="fp32", is_read=True)

    assert nmse(together, alone) <= 1e-4
    assert nmse(alone, exact) <= 1e-4  # what the codes mean, but for the rounding of activations to int8


def test_a_reading_that_is_wrong_is_seen(path, monkeypatch):
    alone = logits(path, monkeypatch, cpu_plan)
    monkeypatch.setitem(FORMS, "toy", READING._replace(offset=4))

    assert nmse(logits(path, monkeypatch, in_three), alone) > 1e-3


def test_sizes_and_rates_follow_from_the_descriptor(path):
    model = decoder(ModelConfig.from_dir(path), WeightFormats("bf16", "bf16", {DOWN: "toy"}))
    workload = build_workload(model, "bf16", "toy", Sizes(max_context=32, max_batch=1, page_size=4, prefill_chunk=8))
    down = next(shard for shard in workload.linears if shard.name == "layers.1.down")

    # 160 inputs are three superblocks of 64; each has 2 lines of scales and minima and 12 of codes.
    assert workload.format_of(down) == "toy" and down.unit_bytes == down.unit_features // 16 * 3 * 14 * 64
    assert HardwareProfile.named("emulated").cpu_linear_bytes_per_s.borrowed(FORMATS)["toy"] == "q8"


def test_the_toy_is_no_format_of_the_package():
    known = {name for name in FORMATS if name != "toy"}

    assert replace(TOY, name="other") not in FORMATS.values() and not any(
        (FORMATS[name].plane, FORMATS[name].header) == (TOY.plane, TOY.header) for name in known
    )
