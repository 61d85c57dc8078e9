"""Rows of codes with a float32 scale a group, or with NVFP4's two: drawn at random, their blocks, and their values."""

import torch

from cpu_kernels.formats import E2M1_TYPE, NF4_VALUES, SCALED_TYPES, GgufType, format_of

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
KINDS = (*SCALED_TYPES.values(), E2M1_TYPE)


def numbers(kind: GgufType, codes: torch.Tensor) -> torch.Tensor:
    """float32 of uint8 codes, one in an item."""
    if format_of(kind.format).plane == "f8":
        return codes.view(torch.float8_e4m3fn).float()
    if kind.format == "int8":
        return codes.view(torch.int8).float()
    table = NF4_VALUES if kind.format == "nf4" else (*E2M1, *(-value for value in E2M1))
    return torch.tensor(table, dtype=torch.float32)[codes.int()]


def random_blocks(kind: GgufType, rows: int, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(uint8 [rows, count * block_bytes], float32 [rows, count * items]): blocks, and their values."""
    generator = torch.Generator().manual_seed(seed)
    plane = format_of(kind.format).plane
    wide = plane in ("f8", "i8")
    codes = torch.randint(256 if wide else 16, (rows, count, kind.items), generator=generator).to(torch.uint8)
    if plane == "f8":
        codes[codes & 127 == 127] = 1  # NaN
    if kind is E2M1_TYPE:
        scales, held = _of_tensor(rows, count, generator)
    else:
        scales = torch.randn(rows, count, 1, generator=generator)
        held = scales.view(torch.uint8)
    values = (numbers(kind, codes) * scales).flatten(1)
    stored = codes if wide else codes[..., 0::2] | codes[..., 1::2] << 4
    return torch.cat((held, stored), -1).flatten(1), values


def _of_tensor(rows: int, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(float32 scales, headers of E2M1 blocks): every E4M3 number there is, times or over a factor for every row."""
    scales = torch.randint(127, (rows, count, 1), generator=generator).to(torch.uint8)
    factor = torch.rand(rows, 1, 1, generator=generator) + 0.1
    divides = torch.randint(2, (rows, 1, 1), generator=generator).bool()
    numbers = scales.view(torch.float8_e4m3fn).float()
    # Halved for the table of twice the values; bytes count as the 256th of their number.
    held = torch.where(divides, -factor / 128, factor * 128).expand(rows, count, 1).contiguous()
    unused = torch.full((rows, count, 3), 77, dtype=torch.uint8)
    found = torch.where(divides, numbers / factor, numbers * factor)
    return found, torch.cat((held.view(torch.uint8), scales, unused), -1)


def packed(ops, kind: GgufType, blocks: torch.Tensor) -> torch.Tensor:
    """The packed weight of blocks, padded with zero rows to whole blocks of features."""
    blocks = torch.nn.functional.pad(blocks, (0, 0, 0, -blocks.shape[0] % 16))
    in_features = blocks.shape[1] // kind.block_bytes * kind.items
    shape = (blocks.shape[0] // 16, format_of(kind.format).block_bytes(in_features))
    out = torch.full(shape, 171, dtype=torch.uint8)
    ops.repack(blocks, kind.name, out)
    return out
