"""A model that a machine cannot hold: said first, with what would fit, and exit code 4."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from hetero_attn import LLM
from hetero_attn.cli import app
from hetero_attn.cli.option_words import in_option_words
from hetero_attn.engine import host_memory
from hetero_attn.errors import MemoryBudgetError
from hetero_attn.planning import fitting, profiles
from hetero_attn.planning.fitting import ARGUMENTS, as_arguments, ways_to_fit, why_not_fitting
from hetero_attn.planning.options import LoadOptions
from hetero_attn.planning.settle import ask, settle
from placement import Policy
from placement.plan.units import parse_bytes
from placement.solve.refusals import smallest

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B), encoding="utf-8")
    return tmp_path


def plan_command(model, *options):
    return CliRunner().invoke(app, ["plan", str(model), "--no-explain", *options])


def test_what_does_not_fit_is_the_first_line_with_the_option_that_would_and_exit_4(model):
    result = plan_command(model, "--hardware", "rtx4090-ddr5", "--context", "4096")

    assert result.exit_code == 4
    first = " ".join(result.output.splitlines()[:2])  # one sentence, which 80 columns may part
    assert first.startswith("DOES NOT FIT: needs 1") and "rtx4090-ddr5 has" in first and "--dtype q4" in first


@pytest.fixture
def without_a_profile(monkeypatch, tmp_path):
    """A machine that was never measured and has 200 GiB of memory."""
    monkeypatch.setattr(profiles, "profile_path", lambda: tmp_path / "none.json")
    monkeypatch.setattr(profiles, "host_memory_bytes", lambda: 200 * 2**30)
    monkeypatch.setattr(host_memory, "free_host_bytes", lambda *_: 200 * 2**30)


@pytest.mark.usefixtures("without_a_profile")
def test_a_machine_without_a_profile_has_its_own_memory_not_that_of_its_stand_in(model):
    """Whatever was free, 7.45 GiB of the catalogue's were planned with."""
    fits = plan_command(model, "--device", "cpu", "--context", "4096")
    too_large = plan_command(model, "--device", "cpu", "--context", "4096", "--dtype", "fp32")

    assert fits.exit_code == 0 and "of 200.00 GiB DRAM" in fits.stdout.splitlines()[0]
    assert too_large.exit_code == 4
    assert "of host memory; this machine has 200.00 GiB" in " ".join(too_large.output.split())


def test_the_options_that_are_named_do_fit(model):
    wishes = LoadOptions(model=model, hardware="rtx4090-ddr5", max_context=4096, max_batch=2)

    assert ways_to_fit(wishes) == ["--dtype q8", "--dtype q4"]
    fits = [not why_not_fitting(settle(replace(wishes, dtype=dtype))) for dtype in ("auto", "q8", "q4")]
    assert fits == [False, True, True]


def test_what_is_too_large_by_its_weights_alone_is_not_searched_for_and_no_plan_would_fit(model, monkeypatch):
    """Of 70B on a laptop every smaller wish was planned twice, which took ten seconds."""
    wishes = [
        LoadOptions(model=model, hardware=machine, max_context=1024, dtype=dtype)
        for machine in ("laptop-8gb-ddr5", "rtx3060-ddr4", "rtx4090-ddr5")
        for dtype in ("bf16", "q8", "q4")
    ]
    too_large = [wish for wish in wishes if ask(wish).is_too_large]
    assert 0 < len(too_large) < len(wishes)
    assert all(why_not_fitting(settle(wish)) for wish in too_large)

    monkeypatch.setattr(fitting, "settle", lambda *_: pytest.fail("a plan was searched for"))
    with pytest.raises(MemoryBudgetError, match="together are less than the weights"):
        fitting.settle_unless_too_large(too_large[0])


def test_a_budget_beyond_the_card_is_named_as_what_to_leave_out(model):
    """No smaller dtype or context helps there, which was all that was said."""
    result = plan_command(model, "--hardware", "rtx4090-ddr5", "--gpu-memory", "100GiB", "--dtype", "q4")

    assert result.exit_code == 4
    assert "would fit with no --gpu-memory" in " ".join(result.output.split())
    assert as_arguments("would fit with no --gpu-memory") == "would fit with no gpu_memory"


def test_of_several_contexts_that_fit_the_longest_is_named(model):
    found = ways_to_fit(LoadOptions(model=model, hardware="rtx3060-ddr4", dtype="q4", max_context=8192))

    assert [way for way in found if way.startswith("--context")] == ["--context 4096"], "half"


@pytest.mark.parametrize(
    ("wished", "changed"),
    [
        ({"max_batch": 1, "dtype": "q4", "max_context": 512}, ["kv-dtype"]),
        ({"max_batch": 2, "kv_dtype": "q4"}, ["dtype", "batch", "context"]),
        ({"policy": Policy(batch=2, context=512, kv_dtype="q4"), "dtype": "q4"}, ["batch"]),
        ({"policy": Policy(objective="throughput")}, ["dtype", "kv-dtype", "batch", "context"]),
        ({"policy": Policy(objective="throughput", batch=1)}, ["dtype", "kv-dtype", "context"]),
    ],
)
def test_what_must_be_smaller_together_names_nothing_that_is_small_already(model, wished, changed):
    """It named `--batch 1` where one sequence was planned for, and a longer context than was asked for."""
    tried = []

    def settled(wishes):
        tried.append(wishes)
        if len(tried) < 2 or wishes != together:
            raise MemoryBudgetError("too small")
        return settle(LoadOptions(model=model, hardware="h200-server", dtype="q4", max_context=64))

    wishes = LoadOptions(model=model, **wished)
    least = {"dtype": "q4", "kv-dtype": "q4", "batch": 1, "context": 1024}
    together = replace(wishes, **{ARGUMENTS[option]: least[option] for option in changed})

    found = ways_to_fit(wishes, settled)

    assert found == [" ".join(f"--{option} {least[option]}" for option in changed) + " together" * (len(changed) > 1)]


def test_what_need_not_be_smaller_is_not_named(model):
    """A context of 8,192 fitted beside q4 weights and cache, and 1,024 were named."""
    wishes = LoadOptions(model=model, hardware="rtx3060-ddr4")

    assert ways_to_fit(wishes) == ["--dtype q4 --kv-dtype q4 together"]


def test_a_load_that_does_not_fit_names_the_arguments_that_would(model):
    """Only `plan` did; whoever loaded was told a number of bytes."""
    with pytest.raises(MemoryBudgetError, match="would fit with .*kv_dtype=q4|would fit with .*dtype=q4") as raised:
        LLM(model, hardware="h100-server", device="cuda", policy="gpu_only", gpu_memory="60GiB", max_context=4096)

    assert "--" not in str(raised.value)
    assert "--dtype=q4" in in_option_words(str(raised.value))


def test_suggestions_are_arguments_in_python_and_options_in_a_shell():
    said = as_arguments("would fit with --batch 1, or --kv-dtype q8, or --context 2048, or --dtype q4")

    assert said == "would fit with max_batch=1, or kv_dtype=q8, or max_context=2048, or dtype=q4"
    options = "would fit with --batch=1, or --kv-dtype=q8, or --context=2048, or --dtype=q4"
    assert in_option_words(said) == options
    assert in_option_words("its dtype is F8") == "its dtype is F8"


def test_a_rule_that_the_budget_cannot_meet_names_what_would(model):
    result = plan_command(model, "--hardware", "h100-server", "--policy", "gpu_only", "--context", "4096")

    assert result.exit_code == 4
    assert "does not fit: gpu_memory: needs at least" in result.stderr and "would fit with --dtype q8" in result.stderr


@pytest.mark.parametrize(
    ("needed", "given", "said"),
    [
        (450_817_808, 2**20, "450817808 bytes, or 430MiB"),
        (772_752, 100 * 2**10, "772752 bytes, or 755KiB"),
        (772_752, 8, "772752 bytes, or 755KiB; a number without a unit is bytes, write 8GiB for gibibytes"),
    ],
)
def test_the_smallest_budget_is_one_that_can_be_typed(needed, given, said):
    """It was 440252KiB, and who gave 100KiB was told to write a unit."""
    assert smallest(needed, given) == f"the smallest that works is {said}"
    assert needed <= parse_bytes(said.partition("or ")[2].partition(";")[0]) < 1.02 * needed


def test_a_model_that_fits_says_nothing_of_it(model):
    result = plan_command(model, "--hardware", "rtx4090-ddr5", "--context", "4096", "--dtype", "q4")

    assert result.exit_code == 0 and "FIT" not in result.output
