"""Sizes of packed weights by the name of their format; `formats` describes the bytes."""

from cpu_kernels.formats import BLOCK_FEATURES, FORMATS, GROUP_INPUTS, LINE_BYTES, format_of, unit_bytes

WEIGHT_DTYPES = ("fp32", "bf16", "q8", "q4")  # what `pack` makes of floating-point rows
SUPERBLOCK_LINES = {name: item.superblock_bytes // LINE_BYTES for name, item in FORMATS.items() if item.header}
ROW_MAJOR_ITEM_BYTES = {name: item.item_bytes for name, item in FORMATS.items() if item.is_row_major}

__all__ = [
    "BLOCK_FEATURES",
    "GROUP_INPUTS",
    "LINE_BYTES",
    "ROW_MAJOR_ITEM_BYTES",
    "SUPERBLOCK_LINES",
    "WEIGHT_DTYPES",
    "block_bytes",
    "check_weight_dtype",
    "padded_features",
    "padded_inputs",
    "weight_bytes",
]


def check_weight_dtype(weight_dtype: str) -> None:
    """Raises ValueError unless `weight_dtype` is one that `pack` makes."""
    if weight_dtype not in WEIGHT_DTYPES:
        raise ValueError(f"weight_dtype is {weight_dtype!r}; it must be one of {', '.join(WEIGHT_DTYPES)}")


def padded_features(out_features: int) -> int:
    """Output features after padding to whole blocks."""
    return -(-out_features // BLOCK_FEATURES) * BLOCK_FEATURES


def padded_inputs(weight_dtype: str, in_features: int) -> int:
    """Inputs stored per feature: padded to whole superblocks, as they are where rows are plain."""
    return format_of(weight_dtype).padded_inputs(in_features)


def block_bytes(weight_dtype: str, in_features: int) -> int:
    """Bytes of one block of 16 output features, or of one unit of a mix."""
    return unit_bytes(weight_dtype, in_features)


def weight_bytes(weight_dtype: str, out_features: int, in_features: int) -> int:
    """Bytes of a whole packed weight, its padding included."""
    return padded_features(out_features) // BLOCK_FEATURES * block_bytes(weight_dtype, in_features)
