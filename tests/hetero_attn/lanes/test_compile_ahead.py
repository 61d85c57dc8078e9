"""GPU kernels are compiled beside the loading of weights: which, in whose thread, and what a failure leaves."""

import os
import threading
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (the test extra has it on x86-64 Linux)")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiling needs a process without the interpreter", allow_module_level=True)

from triton.runtime import JITFunction

from gpu_kernels import linear_layer
from gpu_kernels.attention import prefill
from gpu_kernels.device_ops import DeviceOps
from gpu_kernels.forms.unpack import FORMS
from gpu_kernels.reference import block_bytes
from hetero_attn.engine.ahead.compile_ahead import compiling_beside, kernel_calls
from hetero_attn.planning.settle import PlannedModel
from placement.machine.hardware import HardwareProfile
from tests.examples.test_benchmarks import load
from tests.support.gpu.silent_triton import silent_triton


@pytest.fixture
def compiled(monkeypatch):
    """Names of the kernels that are compiled, in order."""
    names, compile_ = [], JITFunction._do_compile

    def counted(self, *arguments):
        names.append(self.__name__)
        return compile_(self, *arguments)

    monkeypatch.setattr(JITFunction, "_do_compile", counted)
    return names


def test_the_first_prompt_finds_its_kernels_compiled(compiled, monkeypatch, tmp_path):
    """80 rows in bf16, half of every linear streamed; copies have as many strides as there are buffers."""
    monkeypatch.setattr(prefill, "is_hopper", lambda device: True)
    launches = load("simulated.launches")
    machine = replace(HardwareProfile.named("emulated"), gpu_q8_int8_rows=16, gpu_q4_int8_rows=16)
    with (
        silent_triton(90) as made,
        launches.silent_products(linear_layer),
        launches.queueing_engine(launches.prompt_plan, tmp_path) as engine,
    ):
        planned = PlannedModel(tmp_path, engine.config, "q4", "cuda", machine, engine.plan)
        for _, call in kernel_calls(planned):
            call()
        ahead, launched = len(compiled), made.count
        launches.time_chunks(engine, 1)

    assert launched == 0 < made.count, "compiling launches nothing"
    assert {"_gemv_kernel", "_flat_kernel", "_dequantize_kernel", "_decode_attention_kernel"} < set(compiled[:ahead])
    assert set(compiled[ahead:]) <= {"_copy_rows_kernel"}


@pytest.mark.parametrize("name", [*FORMS, "q8", "q4", "bf16"])
def test_no_format_launches_anything_ahead(name):
    """Addresses of tensors without memory are null: a launch with one ends every GPU call of the process."""
    ops, weight = DeviceOps("meta"), torch.empty(4, block_bytes(name, 256), dtype=torch.uint8, device="meta")
    with silent_triton(90) as made:
        for rows in (1, 130):
            x, out = (torch.empty(rows, width, device="meta") for width in (256, 64))
            ops.linear(x, weight, name, None, out)

    assert made.count == 0


@pytest.fixture
def said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    return []


def test_kernels_are_compiled_in_a_thread_that_ends_with_the_load(said):
    calls, weights = threading.Event(), threading.Event()

    def call():
        calls.set()
        assert weights.wait(10), "compiled beside the weights, not before them"

    with compiling_beside(iter([("rows", call), ("rows", call), ("more", call)]), 0, said.append) as thread:
        assert calls.wait(10)
        assert thread is not threading.current_thread()
        weights.set()

    assert not thread.is_alive()
    assert said == ["rows, while weights are read", "more, while weights are read"]


def test_a_load_that_fails_compiles_no_more(said):
    began, made = threading.Event(), []

    def call():
        made.append(1)
        began.set()
        failed.wait(10)

    failed = threading.Event()
    with (
        pytest.raises(OSError, match="no weights"),
        compiling_beside((("rows", call) for _ in range(100)), 0, said.append),
    ):
        assert began.wait(10)
        threading.Timer(0.2, failed.set).start()
        raise OSError("no weights")

    assert len(made) == 1


def test_a_kernel_that_does_not_compile_is_left_to_the_first_steps(said):
    def call():
        raise RuntimeError("no compiler")

    with compiling_beside(iter([("rows", call), ("more", call)]), 0, said.append) as thread:
        pass

    assert not thread.is_alive() and said == ["rows, while weights are read"]
