"""pack: rows of weights into the layout that every lane reads (formats/weights.py)."""

import torch

from cpu_kernels.checks import check_tensor, expect
from cpu_kernels.formats import weights as layout
from cpu_kernels.team.arguments import PACK
from cpu_kernels.team.team import Team

SOURCE_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def pack(team: Team, rows: torch.Tensor, weight_dtype: str, out: torch.Tensor) -> None:
    """See CpuKernels.pack."""
    check_tensor("rows", rows, tuple(SOURCE_DTYPES), (None, None))
    features, in_features = rows.shape
    expect(
        features % layout.BLOCK_FEATURES == 0,
        f"rows has {features} features; pad them with zero rows to a multiple of {layout.BLOCK_FEATURES}",
    )
    num_blocks, block_bytes = features // layout.BLOCK_FEATURES, layout.block_bytes(weight_dtype, in_features)
    check_tensor("out", out, torch.uint8, (num_blocks, block_bytes))
    is_apart = num_blocks < 2 or out.stride(0) >= block_bytes
    expect(out.stride(1) == 1 and is_apart, "out must have contiguous blocks that do not overlap")
    if weight_dtype == "fp16":  # stays what it is; other numbers are not made float16, whose range is small
        expect(rows.dtype == torch.float16, f"rows is {rows.dtype}; only float16 rows are kept as fp16")
    else:
        layout.check_weight_dtype(weight_dtype)
    if out.numel() == 0:
        return
    failure = team.run(
        ("linear.packing.kernel", "pack", SOURCE_DTYPES[rows.dtype], weight_dtype),
        0,
        *PACK.filled(
            rows=rows.data_ptr(),
            row_bytes=rows.element_size() * rows.stride(0),
            num_blocks=num_blocks,
            row_items=in_features,
            out=out.data_ptr(),
            block_bytes=out.stride(0),
        ),
    )
    expect(failure == 0, "rows holds a non-finite value (NaN or Inf)")
