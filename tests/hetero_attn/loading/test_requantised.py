"""What is said when the codes of a file are held in another dtype: how much the weights change, in Python and on
the command line."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from cpu_kernels.formats import format_of
from hetero_attn import LLM
from hetero_attn.cli import app
from tests.support.kernels.cpu_oracles import kernels
from tests.support.models.gguf_models import make_gguf
from tests.support.quantised.scaled_models import fp8_blocks, fp8_channel, make_scaled

BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.fixture(scope="module")
def fp8(tmp_path_factory) -> Path:
    return make_scaled(tmp_path_factory.mktemp("fp8"), {"": fp8_blocks(128, 128)}, BLOCKS)


def found(model: Path, dtype: str, **wishes):
    with LLM(model, dtype=dtype, device="cpu", max_context=32, progress=False, **wishes) as llm:
        return llm.engine.weights.requantised


def error(values: torch.Tensor) -> float:
    """Root mean square of what q8 changes, over that of the values."""
    rows, width = values.shape
    blocks, back = (
        torch.empty(rows // 16, format_of("q8").block_bytes(width), dtype=torch.uint8),
        torch.empty_like(values),
    )
    kernels().pack(values, "q8", blocks)
    kernels().unpack_rows(blocks, "q8", torch.arange(rows), back)
    return ((back - values).square().sum() / values.square().sum()).sqrt().item()


def test_the_error_is_that_of_the_weights(fp8):
    plain = load_file(fp8 / "plain" / "model.safetensors")
    down = {name: error(values) for name, values in plain.items() if name.endswith("down_proj.weight")}

    told = found(fp8 / "scaled", "q8")

    assert (told.source, told.held_as) == ("fp8", "q8")
    assert 0.5 * min(down.values()) < told.error < 2 * max(down.values())
    assert told.error <= told.worst_error < 0.02
    assert told.weights > 64 * 128


def test_a_linear_that_changes_more_is_named(tmp_path):
    """Where every 32nd weight is twenty times as large as the others, they lie between two steps of its group."""

    def uneven(out, inputs, generator):
        parts, values = fp8_channel(out, inputs, generator)
        parts["weight"][:, ::32] = torch.tensor(2.0).to(torch.float8_e4m3fn)
        return parts, parts["weight"].float() * parts["weight_scale"]

    folder = make_scaled(tmp_path, {"": fp8_channel, "o": uneven}, {"quant_method": "fbgemm_fp8"})

    assert "o_proj" in found(folder / "scaled", "q4").worst


@pytest.mark.filterwarnings("ignore:.*held as float32")
def test_blocks_that_no_format_holds_are_compared_too(tmp_path):
    folder = make_scaled(tmp_path, {"": fp8_blocks(32, 32)}, BLOCKS | {"weight_block_size": [32, 32]})

    assert 0 < found(folder / "scaled", "q8").error < 0.02


@pytest.mark.parametrize(("folder", "dtype"), [("scaled", "auto"), ("scaled", "fp32"), ("plain", "q8")])
def test_nothing_is_said_of_weights_as_in_the_file_or_never_in_codes(fp8, folder, dtype):
    assert found(fp8 / folder, dtype) is None


def test_rounding_codes_to_bf16_is_said(fp8):
    assert 0 < found(fp8 / "scaled", "bf16").error < 0.004


def test_a_gguf_files_codes_are_compared(tmp_path):
    told = found(make_gguf(tmp_path, {}, "Q4_K")[0], "q8")

    assert "q4_k" in told.source and 0 < told.error < 0.02


def test_the_command_prints_it_beside_the_answer(fp8):
    arguments = ["generate", str(fp8 / "scaled"), "-p", "A", "-n", "1", "--device", "cpu", "--context", "64"]

    asked, plain = (CliRunner().invoke(app, [*arguments, *more]) for more in (["--dtype", "q8"], []))

    assert asked.exit_code == 0, asked.output
    assert "weights of the file (fp8) are held as q8: they change by 0." in asked.stderr
    assert "held as" not in asked.stdout + plain.output
