"""The tensor types of GGUF files: their blocks, and the format that holds each without loss.

Layouts: ggml's block structures, written down as `word` and `header` in linear/repacking/source_blocks.py.
"""

from typing import NamedTuple


class GgufType(NamedTuple):
    """A tensor type: `items` consecutive inputs take `block_bytes`. format: what holds it exactly, or ""."""

    name: str
    type_id: int
    items: int
    block_bytes: int
    format: str = ""

    def row_bytes(self, in_features: int) -> int:
        """Bytes of one row; `in_features` must be a multiple of `items`."""
        return in_features // self.items * self.block_bytes


GGUF_TYPES = {
    item.type_id: item
    for item in (
        GgufType("F32", 0, 1, 4, "fp32"),
        GgufType("F16", 1, 1, 2, "fp16"),
        GgufType("Q4_0", 2, 32, 18, "q4_0"),
        GgufType("Q4_1", 3, 32, 20, "q4_1"),
        GgufType("Q5_0", 6, 32, 22, "q5_0"),
        GgufType("Q5_1", 7, 32, 24, "q5_1"),
        GgufType("Q8_0", 8, 32, 34, "q8"),
        GgufType("Q2_K", 10, 256, 84),
        GgufType("Q3_K", 11, 256, 110),
        GgufType("Q4_K", 12, 256, 144, "q4_k"),
        GgufType("Q5_K", 13, 256, 176, "q5_k"),
        GgufType("Q6_K", 14, 256, 210, "q6_k"),
        GgufType("IQ2_XXS", 16, 256, 66),
        GgufType("IQ2_XS", 17, 256, 74),
        GgufType("IQ3_XXS", 18, 256, 98),
        GgufType("IQ1_S", 19, 256, 50),
        GgufType("IQ4_NL", 20, 32, 18, "iq4_nl"),
        GgufType("IQ3_S", 21, 256, 110),
        GgufType("IQ2_S", 22, 256, 82),
        GgufType("IQ4_XS", 23, 256, 136, "iq4_xs"),
        GgufType("IQ1_M", 29, 256, 56),
        GgufType("BF16", 30, 1, 2, "bf16"),
        GgufType("TQ1_0", 34, 256, 54),
        GgufType("TQ2_0", 35, 256, 66),
        GgufType("MXFP4", 39, 32, 17, "mxfp4"),
        GgufType("NVFP4", 40, 64, 36),
    )
}
GGUF_BY_NAME = {item.name: item for item in GGUF_TYPES.values()}
