"""The forms in which rows of weights come from files: GGUF's block types, and groups of codes with a scale.

GPTQ, AWQ and compressed-tensors store codes, scales and zero points apart, each in its own order; their reader lays
a row out as blocks of one group. INT4: float16 scale, u8 zero point, an unused byte, then the codes, two in a byte, the
first in the low nibble; a value is (code - zero point) * scale. UINT8: the same with a byte a code. The others begin
with a float32 scale, and a value is code * scale: FP8 has E4M3 bytes, INT8 signed bytes, NF4 indexes of its table, two
in a byte. E2M1: the float32 t of the header T16, a byte E4M3, three unused, then codes of that type, two in a byte; t
is given as half of what it is, since the table has twice the values.
"""

from cpu_kernels.formats.gguf_types import GGUF_TYPES, GgufType

INT4_GROUPS = (32, 64, 128)
INT4_HEADER_BYTES = 4
SCALE_BYTES = 4

INT4_TYPES = {
    group: GgufType(f"INT4_G{group}", -1, group, INT4_HEADER_BYTES + group // 2, f"int4_g{group}")
    for group in INT4_GROUPS
}
UINT8_TYPES = {
    group: GgufType(f"UINT8_G{group}", -1, group, INT4_HEADER_BYTES + group, f"uint8_g{group}") for group in INT4_GROUPS
}
E2M1_HEADER_BYTES = 8
FP8_TYPES = {
    group: GgufType(f"FP8_G{group}", -1, group, SCALE_BYTES + group, name)
    for group, name in ((32, "fp8_g32"), (64, "fp8_g64"), (128, "fp8"))
}
FP8_TYPE = FP8_TYPES[128]
INT8_TYPE = GgufType("INT8_G128", -1, 128, SCALE_BYTES + 128, "int8")
NF4_TYPE = GgufType("NF4_G64", -1, 64, SCALE_BYTES + 32, "nf4")
E2M1_TYPE = GgufType("E2M1_G16", -1, 16, E2M1_HEADER_BYTES + 8, "nvfp4")
SCALED_TYPES = {item.name: item for item in (*FP8_TYPES.values(), INT8_TYPE, NF4_TYPE)}

_OTHERS = (*INT4_TYPES.values(), *UINT8_TYPES.values(), E2M1_TYPE)
SOURCE_TYPES = {
    item.name: item for item in (*GGUF_TYPES.values(), *_OTHERS) if item.format and item.items > 1
} | SCALED_TYPES
