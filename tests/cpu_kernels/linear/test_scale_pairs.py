"""Sub-scales of Q4_K met two at a time: the same bits as one at a time, also where 16 bits do not hold a dot product."""

import pytest
import torch

from tests.support.kernels.cpu_oracles import kernels
from tests.support.models.gguf_data import CODED, random_rows, repacked

INPUTS, FEATURES = 512, 32
MOST = 32767 // 15  # what the magnitudes of 32 inputs may add up to, so that no codes of four bits make more than int16


def magnitudes(total: int) -> torch.Tensor:
    """32 whole numbers, the first of them 127, that add up to `total`."""
    whole, rest = divmod(total, 127)
    return torch.tensor([127.0] * whole + [float(rest)] + [0.0] * (31 - whole))


def one_run(total: int, sign: float = 1.0, run: int = 0) -> torch.Tensor:
    """Inputs that are rounded to themselves: ordinary ones, but for one run of such magnitudes."""
    inputs = torch.randint(-60, 61, (INPUTS // 32, 32)).float()
    inputs[:, 0] = 127.0
    inputs[run] = sign * magnitudes(total)
    return inputs.flatten()


def weight_of_large_codes(kind) -> torch.Tensor:
    """A weight half of whose features have the largest codes and sub-scales there are."""
    rows = random_rows(kind, FEATURES, INPUTS).reshape(FEATURES, -1, kind.block_bytes)
    rows[::2, :, 4:] = 255
    return repacked(kernels(), kind, rows.reshape(FEATURES, -1))


@pytest.mark.parametrize("rows", [4, 8, 13])
@pytest.mark.parametrize("total", [MOST, MOST + 1, 32 * 127 - 1])
def test_rows_together_are_those_alone(rows, total):
    torch.manual_seed(rows)
    weight = weight_of_large_codes(next(kind for kind in CODED if kind.name == "Q4_K"))
    x = torch.stack([one_run(1000) for _ in range(rows)])
    x[1], x[rows - 1] = one_run(total), one_run(total, -1.0, 5)
    together, alone = torch.empty(rows, FEATURES), torch.empty(rows, FEATURES)

    kernels().linear(x, weight, "q4_k", None, together, False)
    for row in range(rows):
        kernels().linear(x[row : row + 1], weight, "q4_k", None, alone[row : row + 1], False)

    assert torch.equal(together, alone)
