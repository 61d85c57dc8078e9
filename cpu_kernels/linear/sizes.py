"""Sizes and choices that the linear kernels and their wrappers share; the wrappers import no compiler."""

from cpu_kernels.formats import WeightFormat
from cpu_kernels.vectors.isa import Isa

FILLED_ROWS = {"q8": 3}  # rows of a panel that are computed for nothing where a second panel takes longer; else 1
SEGMENT_GROUPS = 32  # groups quantised per chunk
SEGMENT_INPUTS = 2048  # inputs rounded to bf16 per chunk
RANGE_BYTES = 128 << 10  # fewest weight bytes handed out at a time: short enough to balance, and to stay in cache
STREAM_ROWS = 16  # up to here a block is read whole, as one stream; above, inputs go in pieces that stay in cache
PIECE_INPUTS = 4096  # inputs per piece: a panel of rows and a block of weights stay in the first two levels
WIDE_PIECE_INPUTS = 1024  # the same where inputs are float32: a panel of six rows takes 24 KiB
SPREAD_ROWS = 64  # from so many rows on codes are spread to bytes before they are multiplied (forms/spread.py)
SPREAD_NIBBLE_ROWS = 128  # the same of nibbles whose scales are of two levels: taken apart in two instructions each
TURNED_ROWS = 60  # from so many rows on weights of bf16 are turned on 256 bits (panels/turned.py)
WIDE_TURNED_ROWS = 96  # the same with AVX-512, where fewer are as fast along the inputs
TURNED_INPUTS = 256  # at a time: as float32 of 16 features they take half of the first level
NUMBER_ROWS = 6  # and codes that are numbers made float32: a whole tile (forms/number_tiles.py)
SPREAD_BYTES = 192 << 10  # working memory of a thread for it: two blocks of a piece or more, in the second level
SPREAD_PLANES = {"u4": "b4", "u5": "b5", "u6": "b6", "t4": "bt"}
FLIPPED_PLANES = {"i8": "m8", "t4": "mt"}  # where codes are magnitudes (vectors/code_sums.py)
LARGEST_PAIRED = 32767 // (2 * 127)  # code whose products with two inputs fit in int16 as they are
SPREAD_NIBBLES = ("S32", "SM32", "SZ32", "SI32")  # headers with which nibbles gain; sums of longer runs wait for less
NUMBER_BLOCKS = 8  # blocks at once that share what is made of the inputs


def record_bytes(item: WeightFormat) -> int:
    """One row's share of a record of 64 inputs: int8, a float32 scale and 4-byte corrections (records.py): four where
    every 16 inputs have one, else two."""
    return 64 + 4 + 4 * (4 if item.header.endswith("16") else 2)


def pairs_scales(isa: Isa, item: WeightFormat) -> bool:
    """Whether several rows multiply whole-number scales two at a time (forms/scale_pairs.py): of codes of four bits,
    since of larger ones too many dot products could need more than 16 bits."""
    return isa.has_avx512 and item.header == "K2M32" and item.plane == "u4"


def turns_rows(isa: Isa, weight_dtype: str) -> bool:
    """Whether many rows multiply weights that were turned: bf16 that the CPU cannot multiply (panels/turned.py)."""
    return weight_dtype == "bf16" and not isa.has_bf16 and (isa.has_avx2 or isa.has_avx512)


def shares_inputs(isa: Isa, item: WeightFormat) -> bool:
    """Whether blocks share what is made of the inputs of many rows."""
    return item.has_float_codes or turns_rows(isa, item.name)


def spread_plane(isa: Isa, item: WeightFormat) -> str:
    """The plane that a coded format has in working memory, "" where it has none."""
    if not isa.has_avx2:
        return ""
    if isa.name == "avx2" and item.largest_code > LARGEST_PAIRED:
        return FLIPPED_PLANES.get(item.plane, "")
    return SPREAD_PLANES.get(item.plane, "")


def spread_rows(isa: Isa, item: WeightFormat) -> int:
    """From how many rows on they multiply what is made of a format's codes once for all of them; 0 where none do."""
    if item.has_float_codes:
        return NUMBER_ROWS if isa.has_avx2 or isa.has_avx512 else 0
    if turns_rows(isa, item.name):
        return WIDE_TURNED_ROWS if isa.has_avx512 else TURNED_ROWS
    if item.is_row_major or not spread_plane(isa, item):
        return 0
    if item.plane == "u4" and item.header == "K2M32":
        return SPREAD_NIBBLE_ROWS
    return SPREAD_ROWS if item.plane != "u4" or item.header in SPREAD_NIBBLES else 0
