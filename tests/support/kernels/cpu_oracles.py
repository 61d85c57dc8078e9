"""Slow, obvious float64 references of the CPU kernels, and the kernels under test per instruction set.

The layout reader below is written from the description in cpu_kernels/formats/weights.py alone, one byte at a time.
"""

import functools
import math
import struct

import torch

from cpu_kernels import CpuKernels
from cpu_kernels.contract import Routes, Scoring
from cpu_kernels.formats import weights as layout
from cpu_kernels.vectors.isa import available, host_features

ISAS = available(host_features())
# Of registers of 512, 256 and 128 bits; avxvnni widens bf16 exactly as avx2 does.
BF16_PATHS = tuple(name for name in ISAS if name != "avxvnni")


@functools.cache
def kernels(isa: str | None = None, num_threads: int = 2) -> CpuKernels:
    """One team per path and thread count for the whole session."""
    return CpuKernels(num_threads=num_threads, isa=isa)


def nmse(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Normalised mean squared error in float64."""
    expected = expected.double()
    return ((actual.double() - expected).square().sum() / expected.square().sum().clamp(min=1e-300)).item()


def guarded(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """(view of this shape, the NaN-filled memory around it): rows have NaN gaps between them."""
    memory = torch.full((*shape[:-1], shape[-1] + 32), math.nan, dtype=dtype)
    return memory[..., 16 : 16 + shape[-1]], memory


def only_inside_written(memory: torch.Tensor) -> bool:
    """True if the NaN gaps of `guarded` memory are still NaN and nothing between them is."""
    inside = memory[..., 16:-16]
    return bool(memory[..., :16].isnan().all() and memory[..., -16:].isnan().all() and not inside.isnan().any())


def unpack(weight: torch.Tensor, weight_dtype: str, in_features: int) -> torch.Tensor:
    """Packed bytes -> float64 [num_blocks * 16, in_features], byte by byte for q8 and q4."""
    if weight_dtype in layout.ROW_MAJOR_ITEM_BYTES:
        dtype = torch.float32 if weight_dtype == "fp32" else torch.bfloat16
        return weight.view(dtype).reshape(-1, in_features).double()
    rows = torch.zeros(weight.shape[0] * 16, layout.padded_inputs(weight_dtype, in_features), dtype=torch.float64)
    superblock = 64 * layout.SUPERBLOCK_LINES[weight_dtype]
    for block, content in enumerate(row.numpy().tobytes() for row in weight):
        for group in range(len(content) // superblock):
            for feature in range(16):
                values = [read_value(content, group * superblock, weight_dtype, feature, index) for index in range(64)]
                rows[16 * block + feature, 64 * group : 64 * group + 64] = torch.tensor(values, dtype=torch.float64)
    return rows[:, :in_features]


def read_value(content: bytes, at: int, weight_dtype: str, feature: int, index: int) -> float:
    """Input `index` of `feature` in the superblock that starts at byte `at`."""
    if weight_dtype == "q4":
        byte = content[at + 64 * (1 + index // 8) + 4 * feature + index % 4]
        scale, minimum = (struct.unpack_from("<e", content, at + start + 2 * feature)[0] for start in (0, 32))
        return (byte & 15 if index % 8 < 4 else byte >> 4) * scale + minimum
    byte = content[at + 64 * (1 + index // 4) + 4 * feature + index % 4]
    return (byte - 128) * struct.unpack_from("<e", content, at + 32 * (index // 32) + 2 * feature)[0]


def pack(rows: torch.Tensor, weight_dtype: str) -> torch.Tensor:
    """Packed by the kernel under test."""
    out = torch.empty(rows.shape[0] // 16, layout.block_bytes(weight_dtype, rows.shape[1]), dtype=torch.uint8)
    kernels().pack(rows, weight_dtype, out)
    return out


def round_input(x: torch.Tensor, weight_dtype: str) -> torch.Tensor:
    """The input as `linear` sees it, float64."""
    if weight_dtype == "fp32":
        return x.double()
    if weight_dtype == "bf16":
        return x.bfloat16().double()
    columns = x.shape[1]
    groups = torch.nn.functional.pad(x, (0, -columns % 64)).reshape(x.shape[0], -1, 64)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale == 0, torch.zeros_like(groups), torch.round(groups / scale))
    return (codes.double() * scale.double()).reshape(x.shape[0], -1)[:, :columns]


def attention(q, keys, values, visible, scale):
    """Softmax attention of one head in float64: q [rows, d], keys and values [n, d], visible bool [rows, n].

    Beside values of bf16 the weights are rounded to bf16, as they are on every lane; their sum is not.
    """
    scores = (q.double() @ keys.double().T * scale).masked_fill(~visible, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    powers = scores / math.log(2)
    largest = torch.nan_to_num(powers.amax(-1, keepdim=True).ceil(), neginf=0.0) if scores.shape[-1] else 0.0
    weights = torch.exp2(powers - largest)
    rounded = weights.to(torch.bfloat16).double() if values.dtype == torch.bfloat16 else weights
    return torch.nan_to_num(rounded @ values.double() / weights.sum(-1, keepdim=True)), lse


class PagedCache:
    """Random K and V in shuffled pages; positions that no page holds, and whole unused pages, are NaN."""

    def __init__(self, sequences, num_kv_heads, tokens, page_size, head_dim, dtype):
        self.page_size, pages = page_size, -(-tokens // page_size)
        count = sequences * num_kv_heads * pages
        order = torch.randperm(count + 3)[:count].to(torch.int32)
        self.table = order.reshape(sequences, num_kv_heads, pages)
        self.k = torch.full((count + 3, page_size, head_dim), math.nan, dtype=dtype)
        self.v = self.k.clone()
        positions = torch.arange(tokens)
        for sequence in self.table:
            for row in sequence:
                at = row.long()[positions // page_size], positions % page_size
                self.k[at] = torch.randn(tokens, head_dim).to(dtype)
                self.v[at] = torch.randn(tokens, head_dim).to(dtype)

    def rows(self, sequence: int, kv_head: int, start: int, stop: int):
        """K and V of positions [start, stop)."""
        positions = torch.arange(start, max(start, stop))
        pages = self.table[sequence, kv_head].long()[positions // self.page_size]
        return self.k[pages, positions % self.page_size], self.v[pages, positions % self.page_size]


def routing(rows: int, hidden: int, experts: int, top_k: int, *, gated=True, normalise=False, ops=None, x=None):
    """What `route` writes: (ids, places, sources, starts, weights), and the x and router that it read."""
    generator = torch.Generator().manual_seed(rows + experts)
    drawn = torch.randn(rows, hidden, generator=generator)
    x = drawn if x is None else x
    router = torch.zeros(-(-(experts + gated) // 16) * 16, hidden)
    router[: experts + gated] = torch.randn(experts + gated, hidden, generator=generator) * 0.3
    ids, places = (torch.full((rows, top_k), -1, dtype=torch.int32) for _ in range(2))
    sources, starts = (torch.full((size,), -1, dtype=torch.int32) for size in (rows * top_k, experts + 1))
    weights = torch.full((rows, top_k + 1), torch.nan)
    (ops or kernels()).route(x, router, Scoring(gated, normalise), Routes(ids, places, sources, starts, weights))
    return (ids, places, sources, starts, weights), x, router
