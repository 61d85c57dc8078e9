"""The formats of packed weights, described once: what every kernel reads, a planner sizes and a file holds.

Pure Python: nothing here needs torch or a compiler. `base` is the description of a format, `table` the formats there
are and the mixes of them that one linear may have, `gguf_types` the block types of GGUF files and their formats,
`source_types` every form in which coded rows come from files.
"""

from cpu_kernels.formats.base import BLOCK_FEATURES, GROUP_INPUTS, LINE_BYTES, WeightFormat
from cpu_kernels.formats.gguf_types import GGUF_BY_NAME, GGUF_TYPES, GgufType
from cpu_kernels.formats.source_types import (
    E2M1_HEADER_BYTES,
    E2M1_TYPE,
    FP8_TYPE,
    FP8_TYPES,
    INT4_GROUPS,
    INT4_HEADER_BYTES,
    INT4_TYPES,
    INT8_TYPE,
    NF4_TYPE,
    SCALE_BYTES,
    SCALED_TYPES,
    SOURCE_TYPES,
    UINT8_TYPES,
)
from cpu_kernels.formats.table import (
    FORMATS,
    NF4_VALUES,
    Segment,
    format_of,
    mix_name,
    segments,
    unit_blocks,
    unit_bytes,
    widest,
)

__all__ = [
    "BLOCK_FEATURES",
    "E2M1_HEADER_BYTES",
    "E2M1_TYPE",
    "FORMATS",
    "FP8_TYPE",
    "FP8_TYPES",
    "GGUF_BY_NAME",
    "GGUF_TYPES",
    "GROUP_INPUTS",
    "INT4_GROUPS",
    "INT4_HEADER_BYTES",
    "INT4_TYPES",
    "INT8_TYPE",
    "LINE_BYTES",
    "NF4_TYPE",
    "NF4_VALUES",
    "SCALED_TYPES",
    "SCALE_BYTES",
    "SOURCE_TYPES",
    "UINT8_TYPES",
    "GgufType",
    "Segment",
    "WeightFormat",
    "format_of",
    "mix_name",
    "segments",
    "unit_blocks",
    "unit_bytes",
    "widest",
]
