"""Plans of a model with what drafts for it: written and read again, within every budget, and refused by name.

Nothing is loaded here but toys; what drafts do to answers is in test_draft_model.py.
"""

import re
from dataclasses import replace

import pytest

from hetero_attn import LLM, Policy
from hetero_attn.engine import host_memory
from hetero_attn.engine.host_memory import why_too_large
from hetero_attn.errors import ArgumentError, CheckpointError, ConfigError, MemoryBudgetError
from hetero_attn.planning.draft import settle_drafted
from hetero_attn.planning.fitting import why_not_fitting
from hetero_attn.planning.options import LoadOptions
from hetero_attn.planning.settle import settle
from placement import PolicyError
from placement.plan.memory import PLACES
from placement.plan.table import opening_lines
from placement.plan.units import format_bytes, parse_bytes
from tests.support.models.eagle import make_head
from tests.support.models.runtime import THREADS
from tests.support.models.toy import make_checkpoint
from tests.support.processes.command import ROOT, TINY, run


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A model, a small one and an EAGLE-3 head of its vocabulary."""
    folder, shape = tmp_path_factory.mktemp("plans"), {"max_position_embeddings": 64}
    large = make_checkpoint(folder / "large", "qwen3", num_heads=8, num_kv_heads=4, **shape)
    small = make_checkpoint(folder / "small", "llama", layers=1, num_heads=2, hidden=48, **shape)
    return {"large": large, "small": str(small), "head": str(make_head(folder / "head")), "ngram": "ngram"}


def wishes(paths, **options):
    return LoadOptions(model=paths["large"], page_size=4, num_threads=2, **{"device": "emulated"} | options)


@pytest.mark.parametrize(("drafter", "gpu_memory"), [("small", "600KiB"), ("small", "900KiB"), ("head", "900KiB")])
def test_a_plan_with_a_drafter_is_the_same_when_it_is_read_again(paths, drafter, gpu_memory):
    """A cut that leaves no choice leaves the drafter's place open: of those that fit the fastest is taken."""
    made = settle_drafted(wishes(paths, gpu_memory=gpu_memory, speculate=paths[drafter]))
    again = settle_drafted(wishes(paths, policy=Policy.parse(made.planned.plan.to_yaml())))

    assert made.planned.plan.gpu_memory_bytes == parse_bytes(gpu_memory)
    assert again.wish == paths[drafter] and again.draft.plan == made.draft.plan
    assert again.planned.plan == made.planned.plan


def test_what_the_command_writes_is_what_it_reads(paths, tmp_path):
    file = str(tmp_path / "plan.yaml")
    asked = ["plan", str(paths["large"]), "--device", "emulated", "--threads", "2", "--no-explain"]
    written = run(*asked, "--gpu-memory", "900KiB", "--speculate", paths["small"], "--yaml", file)
    read = run(*asked, "--policy", file)

    assert (written.exit_code, read.exit_code) == (0, 0), read.stderr
    alone = "without drafts, with a plan of its own"  # which the cut then leaves no choice to
    assert read.stdout.partition(alone)[0] == written.stdout.partition(alone)[0] and alone in read.stdout


def test_rules_that_leave_no_choice_leave_the_chunk_open(paths):
    """The fastest chunk may take what the cut leaves no room for."""
    made = settle(wishes(paths, gpu_memory="900KiB")).plan
    open_chunk = Policy.parse(made.to_yaml()).model_copy(update={"prefill_chunk": None})
    tight = settle(wishes(paths, policy=open_chunk, gpu_memory=made.memory.gpu_bytes)).plan

    assert tight.memory.gpu_bytes <= made.memory.gpu_bytes
    assert (tight.linears, tight.kv) == (made.linears, made.kv)


@pytest.mark.parametrize("drafter", ["small", "ngram"])
def test_a_loaded_model_writes_the_plan_that_it_has(paths, drafter):
    """The drafter was left out, and its share of the budget with it."""
    fixed = {"device": "emulated", "page_size": 4, "num_threads": THREADS, "progress": False}
    large, wish = paths["large"], paths[drafter]
    with LLM(large, gpu_memory="900KiB", speculate=wish, **fixed) as llm:
        written, plan, speculator = llm.plan.to_yaml(), llm.plan, llm._scheduler.speculator
        own = getattr(speculator._model, "engine", None)
        with LLM(large, policy=Policy.parse(written), **fixed) as again:
            read = getattr(again._scheduler.speculator._model, "engine", None)
            assert again.plan == plan and again.planned.policy.speculate == wish
            assert (own and own.plan) == (read and read.plan) and bool(own) == (drafter == "small")


def taken(drafted):
    """Bytes of GPU memory and of host memory that the model and its drafter take together: what the one plan says is
    what both say, each of itself."""
    both, own = (plan.memory for plan in drafted.plans)
    for place in PLACES:
        assert getattr(both, place).get("drafter", 0) == sum(getattr(own, place).values())
    return both.gpu_bytes, both.host_bytes + both.pinned_bytes


def refusal(paths, **options):
    with pytest.raises(MemoryBudgetError, match="beside the draft model small") as error:
        settle_drafted(wishes(paths, speculate=paths["small"], **options))
    return int(re.search(r"smallest that works is (\d+) bytes", str(error.value))[1])


@pytest.mark.parametrize("gpu_memory", ["50KiB", "200KiB"])
def test_the_smallest_budget_for_both_is_said_and_works(paths, gpu_memory):
    """It was that of the model alone, which was then refused without a size."""
    least = refusal(paths, gpu_memory=gpu_memory)

    assert taken(settle_drafted(wishes(paths, gpu_memory=least, speculate=paths["small"])))[0] <= least
    assert refusal(paths, gpu_memory=least - 1) == least


def test_a_budget_of_host_memory_holds_both_or_names_the_smallest_that_does(paths):
    """The drafter was counted nowhere."""
    alone = settle(wishes(paths, device="cpu")).plan.memory
    least = refusal(paths, device="cpu", policy=Policy(host_memory=alone.host_bytes + 1000))
    made = settle_drafted(wishes(paths, device="cpu", policy=Policy(host_memory=least), speculate=paths["small"]))

    assert taken(made) == (0, least) and made.planned.plan.host_memory_bytes == least
    assert made.planned.plan.memory.host["drafter"] == least - alone.host_bytes
    assert refusal(paths, device="cpu", policy=Policy(host_memory=least - 1)) == least


def test_what_host_memory_does_not_hold_goes_to_the_gpu(paths):
    options = {"gpu_memory": "900KiB", "speculate": paths["small"]}
    free = settle_drafted(wishes(paths, **options))
    budget = taken(free)[1] - 4096
    kept = settle_drafted(wishes(paths, policy=Policy(host_memory=budget), **options))

    assert taken(kept)[1] <= budget and taken(kept)[0] <= 900 << 10


def test_the_opening_counts_both(paths):
    drafted = settle_drafted(wishes(paths, gpu_memory="900KiB", speculate=paths["small"]))
    (gpu, host), workload = taken(drafted), drafted.planned.plan.workload
    opening = opening_lines(drafted.planned.plan)

    assert opening[0] == f"fits: {format_bytes(gpu)} of 900.00 KiB GPU memory and {format_bytes(host)} DRAM"
    assert f" + {format_bytes(workload.drafter_gpu_bytes)} GPU memory" in opening[1]
    assert f" + {format_bytes(workload.drafter_host_bytes)} DRAM" in opening[1]
    on_cpu = settle_drafted(wishes(paths, device="cpu", speculate=paths["small"]))
    assert opening_lines(on_cpu.planned.plan)[0] == f"fits: {format_bytes(taken(on_cpu)[1])} DRAM"


def test_a_machine_holds_both_or_not(paths):
    planned = settle_drafted(wishes(paths, device="cpu", speculate=paths["small"])).planned
    memory, drafter = planned.plan.memory, planned.plan.workload.drafter_host_bytes

    def why(dram_bytes):
        return why_not_fitting(replace(planned, hardware=replace(planned.hardware, dram_bytes=dram_bytes)))

    assert memory.host["drafter"] == drafter > 0 and why(memory.host_bytes) == ""
    assert "of host memory with the drafter" in why(memory.host_bytes - 1)


def test_free_memory_is_asked_for_both(paths, monkeypatch):
    plans = [each.plan for each in (settle(wishes(paths)), settle(replace(wishes(paths), model=paths["small"])))]
    needed = sum(plan.workload.embed_bytes + plan.workload.weight_bytes for plan in plans)
    monkeypatch.setattr(host_memory, "free_host_bytes", lambda root: needed - 1)

    assert "their weights need" in why_too_large(*plans) and why_too_large(plans[0]) == ""


@pytest.mark.parametrize("drafter", ["small", "head"])
def test_both_are_asked_for_before_anything_is_loaded(paths, monkeypatch, drafter):
    """The drafter was looked at once the model had been loaded."""
    drafted = settle_drafted(wishes(paths, gpu_memory="900KiB", speculate=paths[drafter]))
    needed = sum(plan.workload.embed_bytes + plan.workload.weight_bytes for plan in drafted.plans)
    monkeypatch.setattr(host_memory, "free_host_bytes", lambda root: needed - 1)
    monkeypatch.setattr("hetero_attn.llm.load_beside", lambda *arguments: pytest.fail("loading has begun"))

    with pytest.raises(MemoryBudgetError, match=f"large with the drafter {drafter}: their weights need"):
        LLM(paths["large"], device="emulated", gpu_memory="900KiB", speculate=paths[drafter], progress=False)


def test_a_reserved_byte_of_the_drafter_counts_once(paths, monkeypatch):
    """Its memory is in the model's plan and in its own."""
    drafted = settle_drafted(wishes(paths, device="cpu", speculate=paths["small"]))
    needed = drafted.planned.plan.memory.host_bytes
    monkeypatch.setattr(host_memory, "free_address_space", lambda: needed)
    assert why_too_large(*drafted.plans) == ""
    monkeypatch.setattr(host_memory, "free_address_space", lambda: needed - 1)
    assert "they need" in why_too_large(*drafted.plans)


@pytest.mark.parametrize("drafter", ["small", "ngram"])
def test_budgets_of_host_memory_are_written_and_read_again(paths, drafter):
    budgets = {"host_memory": 4 << 20, "pinned_memory": 2 << 20}
    made = settle_drafted(wishes(paths, policy=Policy(**budgets), gpu_memory="600KiB", speculate=paths[drafter]))
    policy = Policy.parse(made.planned.plan.to_yaml())
    again = settle_drafted(wishes(paths, policy=policy))

    assert {key: getattr(policy, key) for key in budgets} == budgets
    assert again.planned.plan == made.planned.plan


def test_a_drafter_of_another_vocabulary_is_refused_before_anything_is_planned(tmp_path):
    """`plan` showed what it would bring."""
    other = make_checkpoint(tmp_path / "other", "llama", layers=1, vocab=400)
    result = run("plan", TINY, "--device", "cpu", "--no-explain", "--speculate", str(other))

    assert result.exit_code == 3 and result.stdout == ""
    assert "vocabularies have 400 and 4096 tokens" in " ".join(result.stderr.split())


def test_embeddings_of_one_vocabulary_may_be_padded_differently(tmp_path):
    large, small = (make_checkpoint(tmp_path / str(size), "llama", layers=1, vocab=size) for size in (300, 384))

    assert settle_drafted(LoadOptions(model=large, device="cpu", speculate=small)).draft is not None


def several_gguf(folder):
    for name in ("a-Q4_0.gguf", "b-Q4_0.gguf"):
        (folder / name).write_bytes(b"GGUF")
    return str(folder)


@pytest.mark.parametrize(
    ("wish", "kind", "words"),
    [
        (lambda folder: str(ROOT / "README.md"), CheckpointError, "expected a model directory"),
        (str, (CheckpointError, ConfigError), "config.json"),
        (several_gguf, CheckpointError, "give the path of one of them: a-Q4_0.gguf, b-Q4_0.gguf"),
    ],
)
def test_what_is_wrong_with_a_drafter_is_said_of_the_drafter(paths, tmp_path, wish, kind, words):
    with pytest.raises(kind, match=re.escape(words)) as error:
        settle_drafted(wishes(paths, speculate=wish(tmp_path)))

    assert str(error.value).startswith("speculate: the drafter ") and "--gguf" not in str(error.value)


def test_a_misspelt_way_to_draft_is_recognised(paths):
    with pytest.raises(ArgumentError, match="did you mean 'ngram'"):
        wishes(paths, speculate="NGRAM")
    with pytest.raises(PolicyError, match="did you mean 'ngram'"):
        Policy.parse("speculate: NGRAM\n")
    for nothing in (lambda: wishes(paths, speculate=""), lambda: Policy.parse('speculate: ""\n')):
        with pytest.raises((ArgumentError, PolicyError), match="must be one of off, ngram, auto"):
            nothing()


@pytest.mark.parametrize(("drafter", "is_said"), [("small", True), ("ngram", False)])
def test_a_drafter_that_takes_memory_for_nothing_costs_more_than_it_brings(paths, drafter, is_said):
    """It was said only of passes of several rows."""
    drafted = settle_drafted(wishes(paths, gpu_memory="900KiB", speculate=paths[drafter]))
    rates = drafted.rates
    one_row = replace(drafted, rates=replace(rates, widths=rates.widths[:1]))

    assert one_row.rates.best.rows == 1
    assert ("costs more than it brings" in "\n".join(one_row.lines())) == is_said
