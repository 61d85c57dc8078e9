"""The packed weight layout, described once: every kernel, on the CPU or elsewhere, reads these bytes.

A packed weight is uint8 [num_blocks, block_bytes], contiguous. A block holds BLOCK_FEATURES = 16 consecutive output
features; missing features of the last block are zero rows.

fp32, bf16   a block is row-major [16, in_features] in that dtype.
q4, q8       in_features is padded with zeros to a multiple of GROUP_INPUTS = 64; a block is one superblock per 64
             inputs, in order. A superblock is a run of 64-byte lines that interleave the 16 features, so that one
             vector register holds the same inputs of all features and no dot product ever crosses lanes:
  q4 (576 B) line 0: 16 float16 scales, then 16 float16 minima. Line 1+j, byte 4*f+i: the low nibble is input 8j+i of
             feature f and the high nibble input 8j+4+i. value = nibble * scale + minimum.
  q8 (1088 B) line 0: 16 float16 scales of inputs 0..31, then 16 of inputs 32..63. Line 1+j, byte 4*f+i: input 4j+i of
             feature f as q + 128, q in -127..127. value = (byte - 128) * scale.

This file is pure Python: a planner may import it on a machine that has no compiler.
"""

BLOCK_FEATURES = 16
GROUP_INPUTS = 64
LINE_BYTES = 64
WEIGHT_DTYPES = ("fp32", "bf16", "q8", "q4")
SUPERBLOCK_LINES = {"q8": 17, "q4": 9}
ROW_MAJOR_ITEM_BYTES = {"fp32": 4, "bf16": 2}


def check_weight_dtype(weight_dtype: str) -> None:
    """Raises ValueError unless `weight_dtype` is one of WEIGHT_DTYPES."""
    if weight_dtype not in WEIGHT_DTYPES:
        raise ValueError(f"weight_dtype is {weight_dtype!r}; it must be one of {', '.join(WEIGHT_DTYPES)}")


def padded_features(out_features: int) -> int:
    """Output features after padding to whole blocks."""
    return -(-out_features // BLOCK_FEATURES) * BLOCK_FEATURES


def padded_inputs(weight_dtype: str, in_features: int) -> int:
    """Inputs stored per feature: padded to whole groups for q8 and q4, as they are otherwise."""
    check_weight_dtype(weight_dtype)
    if weight_dtype in ROW_MAJOR_ITEM_BYTES:
        return in_features
    return -(-in_features // GROUP_INPUTS) * GROUP_INPUTS


def block_bytes(weight_dtype: str, in_features: int) -> int:
    """Bytes of one block of 16 output features."""
    inputs = padded_inputs(weight_dtype, in_features)
    if weight_dtype in ROW_MAJOR_ITEM_BYTES:
        return BLOCK_FEATURES * inputs * ROW_MAJOR_ITEM_BYTES[weight_dtype]
    return inputs // GROUP_INPUTS * SUPERBLOCK_LINES[weight_dtype] * LINE_BYTES


def weight_bytes(weight_dtype: str, out_features: int, in_features: int) -> int:
    """Bytes of a whole packed weight, its padding included."""
    return padded_features(out_features) // BLOCK_FEATURES * block_bytes(weight_dtype, in_features)
