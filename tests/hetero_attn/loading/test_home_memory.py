"""Memory of linears: apart from each other, in one piece where it fits, and there as long as anybody has a part."""

import gc

import torch

from hetero_attn.checkpoints.loading.home_memory import LINE_BYTES, HomeMemory

SHAPES = [(3, 128), (5, 64), (0, 64), (1, 1000), (7, 192)]
TOTAL = 3 * 128 + 5 * 64 + 1024 + 7 * 192


def test_linears_lie_side_by_side_and_keep_what_is_written():
    homes = HomeMemory(TOTAL)
    tensors = [homes.take(shape) for shape in SHAPES]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    starts = [tensor.data_ptr() for tensor in tensors if tensor.numel()]

    assert [tensor.shape for tensor in tensors] == SHAPES
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))
    assert starts[-1] + 7 * 192 - starts[0] == TOTAL
    assert all(start % LINE_BYTES == 0 for start in starts)


def test_more_than_was_told_is_given_in_another_piece():
    homes = HomeMemory(100)
    first, second = homes.take((80,)).fill_(1), homes.take((4 << 20,)).fill_(2)
    third = homes.take((90,)).fill_(3)

    assert [int(tensor.float().mean()) for tensor in (first, second, third)] == [1, 2, 3]


def test_a_part_keeps_its_memory():
    homes = HomeMemory(16 << 20)
    kept = homes.take((4 << 20,)).fill_(7)
    del homes
    gc.collect()
    torch.empty(16 << 20, dtype=torch.uint8).fill_(1)

    assert bool((kept == 7).all())


def test_each_has_a_storage_of_its_own():
    """By which other parts of the program tell linears apart."""
    homes = HomeMemory(1024)

    assert homes.take((256,)).untyped_storage().nbytes() == 256
