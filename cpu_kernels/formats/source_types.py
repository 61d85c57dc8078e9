"""The forms in which rows of weights come from files: GGUF's block types, and groups of int4 with a zero point.

GPTQ, AWQ and compressed-tensors store codes, scales and zero points apart and each in its own order; their reader lays
a row out as blocks of one group: float16 scale, u8 zero point, an unused byte, then the codes, two in a byte, the first
in the low nibble. A value is (code - zero point) * scale.
"""

from cpu_kernels.formats.gguf_types import GGUF_TYPES, GgufType

INT4_GROUPS = (32, 64, 128)
INT4_HEADER_BYTES = 4

INT4_TYPES = {
    group: GgufType(f"INT4_G{group}", -1, group, INT4_HEADER_BYTES + group // 2, f"int4_g{group}")
    for group in INT4_GROUPS
}
SOURCE_TYPES = {
    item.name: item for item in (*GGUF_TYPES.values(), *INT4_TYPES.values()) if item.format and item.items > 1
}
