"""How many rows of a prompt are computed at once, where nobody said."""

from dataclasses import replace

import pytest

from hetero_attn.planning.settle import fit_prefill_chunk
from tests.support.planning_models import llama_8b


@pytest.mark.parametrize(
    "budget_mib,context,chunk",
    [(1, 8192, 16), (100, 8192, 256), (400, 8192, 512), (1200, 8192, 1024), (1 << 16, 8192, 2048), (1 << 16, 700, 512)],
)
def test_the_chunk_follows_the_budget_and_never_passes_the_context(budget_mib, context, chunk):
    """A row of activations takes 64 KiB here: a quarter of a small budget at most, a twelfth of a large one."""
    workload = replace(llama_8b(), max_context=context, activation_bytes_per_row=1 << 16)

    fitted = fit_prefill_chunk(lambda prefill_chunk: replace(workload, prefill_chunk=prefill_chunk), budget_mib << 20)

    assert fitted.prefill_chunk == chunk
