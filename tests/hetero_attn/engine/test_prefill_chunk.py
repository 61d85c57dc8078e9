"""How many rows of a prompt are computed at once, where nobody said."""

from dataclasses import replace

import pytest

from hetero_attn.planning.choices import with_chunk_choices
from hetero_attn.planning.options import LoadOptions
from hetero_attn.planning.settle import settle
from placement import HardwareProfile, Policy, make_plan
from placement.plan.workload import ChunkChoice
from tests.support.models.toy import make_checkpoint
from tests.support.planning.planning_models import llama_8b


@pytest.mark.parametrize(
    "budget_mib,context,chunks",
    [
        (1, 8192, (16,)),
        (100, 8192, (128, 256)),
        (400, 8192, (512, 1024)),
        (1 << 16, 8192, (512, 1024, 2048)),
        (1 << 16, 700, (512,)),
    ],
)
def test_chunks_to_choose_from_follow_the_budget_and_never_pass_the_context(budget_mib, context, chunks):
    """A row of activations takes 64 KiB here: a quarter of the budget at most, half of it beside more than a tenth."""
    workload = replace(llama_8b(), max_context=context, activation_bytes_per_row=1 << 16)

    fitted = with_chunk_choices(lambda prefill_chunk: replace(workload, prefill_chunk=prefill_chunk), budget_mib << 20)

    assert tuple(choice.rows for choice in fitted.chunk_choices) == chunks
    assert fitted.prefill_chunk == chunks[0]


def test_the_planner_takes_a_large_chunk_where_weights_are_streamed_and_a_small_one_where_memory_is_short():
    """Half of the weights cross the bus once a chunk; a chunk of any size does where everything fits. 1024 rows of
    1200 KiB leave so little to the weights that decode loses more than prompts gain, each by a tenth and not by a
    rounding; with 400 KiB a row they do not."""

    def plan(objective, gib, row_kib, **wishes):
        workload = replace(llama_8b(dtype="q4", context=8192), activation_bytes_per_row=row_kib << 10)
        choices = tuple(ChunkChoice(rows, workload.resident_bytes) for rows in (256, 1024))
        policy = Policy(objective=objective, **wishes)
        machine = HardwareProfile.named("h100-server")
        return make_plan(
            replace(workload, chunk_choices=choices), machine, policy, device="cuda", gpu_memory_bytes=int(gib * 2**30)
        )

    found = [plan("latency", 2.5, 400), plan("latency", 4.5, 1200), plan("prefill", 4.5, 1200)]
    assert [each.prefill_chunk for each in found] == [1024, 256, 1024]


def test_a_chunk_of_the_policy_leaves_the_planner_no_choice(tmp_path):
    path = make_checkpoint(tmp_path, "llama")
    given, open_ = (
        settle(LoadOptions(model=path, device="emulated", policy=policy))
        for policy in (Policy(prefill_chunk=24), "auto")
    )

    assert given.plan.prefill_chunk == 24 and given.workload.chunk_choices == ()
    assert open_.workload.chunk_choices and 24 not in {choice.rows for choice in open_.workload.chunk_choices}
