"""repack: coded rows of a file into the format that holds them exactly; unpack_rows: rows of it as numbers."""

import torch

from cpu_kernels.checks import check_tensor, expect
from cpu_kernels.formats import SOURCE_TYPES, format_of, unit_bytes
from cpu_kernels.formats import weights as layout
from cpu_kernels.team.arguments import PACK, UNPACK
from cpu_kernels.team.team import Team

NUMBERS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def repack(team: Team, rows: torch.Tensor, source_type: str, out: torch.Tensor) -> None:
    """See CpuKernels.repack."""
    expect(source_type in SOURCE_TYPES, f"source_type is {source_type!r}; it must be one of {', '.join(SOURCE_TYPES)}")
    source = SOURCE_TYPES[source_type]
    check_tensor("rows", rows, torch.uint8, (None, None))
    features, row_bytes = rows.shape
    expect(
        features % layout.BLOCK_FEATURES == 0,
        f"rows has {features} features; pad them with zero rows to a multiple of {layout.BLOCK_FEATURES}",
    )
    expect(row_bytes % source.block_bytes == 0, f"rows of {row_bytes} bytes are no whole blocks of {source_type}")
    in_features = row_bytes // source.block_bytes * source.items
    num_blocks, block_bytes = features // layout.BLOCK_FEATURES, unit_bytes(source.format, in_features)
    check_tensor("out", out, torch.uint8, (num_blocks, block_bytes))
    is_apart = num_blocks < 2 or out.stride(0) >= block_bytes
    expect(out.stride(1) == 1 and is_apart, "out must have contiguous blocks that do not overlap")
    if out.numel() == 0:
        return
    failure = team.run(
        ("linear.repacking.kernel", "repack", source_type),
        0,
        *PACK.filled(
            rows=rows.data_ptr(),
            row_bytes=rows.stride(0),
            num_blocks=num_blocks,
            row_items=row_bytes // source.block_bytes,
            out=out.data_ptr(),
            block_bytes=out.stride(0),
        ),
    )
    expect(failure == 0, "rows holds a scale that is not finite (NaN or Inf)")


def unpack_rows(team: Team, weight: torch.Tensor, weight_dtype: str, row_ids: torch.Tensor, out: torch.Tensor) -> None:
    """See CpuKernels.unpack_rows."""
    item = format_of(weight_dtype)
    check_tensor("row_ids", row_ids, torch.int64, (None,))
    check_tensor("out", out, torch.float32, (row_ids.shape[0], None))
    in_features = out.shape[1]
    if item.is_row_major:
        check_tensor("weight", weight, NUMBERS[weight_dtype], (None, in_features))
        factory, rows = "unpack_numbers", weight.shape[0]
    else:
        check_tensor("weight", weight, torch.uint8, (None, item.block_bytes(in_features)))
        factory, rows = "unpack", weight.shape[0] * layout.BLOCK_FEATURES
    expect(weight.is_contiguous(), "weight must be contiguous")
    if out.numel() == 0:
        return
    failure = team.run(
        ("linear.unpack_kernel", factory, weight_dtype),
        0,
        *UNPACK.filled(
            weight=weight.data_ptr(),
            block_bytes=weight.stride(0) * weight.itemsize,
            rows=rows,
            ids=row_ids.data_ptr(),
            count=row_ids.shape[0],
            in_features=in_features,
            out=out.data_ptr(),
            out_row=4 * out.stride(0),
        ),
    )
    expect(failure == 0, f"row_ids holds an id that is not in 0..{rows - 1}")
