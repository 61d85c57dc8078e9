"""Tiles and working memory that the attention kernels and their wrappers share. Sizes are in bytes."""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from cpu_kernels.formats.pages import GROUP_DIMS, GROUP_NUMBERS

if TYPE_CHECKING:
    from cpu_kernels.vectors.isa import Isa

KEY_TILE = 64  # keys of one tile: a run of rows of one page
LINE_BYTES = 64
LANES = 16  # of a register, as in vectors/vector.py, which a warm start does not import

SPLIT_TILES = 8  # tiles of a split; shorter ones cost more in merging than they balance
PREFILL_SCORES = 4  # query vectors per score tile: 4 x 64 keys fill 16 registers
PREFILL_VALUES = 8  # query vectors per pass over V
LONG_ROW = 128  # dims from which on eight heads that share keys take them as they lie
ROWS_TOGETHER = 16  # rows of one sequence, at most, that are an item of decode; as many as linears sum alike
ROW_VECTORS = 8  # query vectors that take a tile of rows as they lie together: their q is read again for a few keys
BLOCK_VECTORS = 32  # of a tile whose keys are transposed: the more, the fewer times that is done
JOINED_SCORES = 4  # query vectors of several rows that share keys and whose softmax is taken together
NARROW_VALUES = 4  # the same, and query heads of decode, where their sums would not fit in the registers
PREFILL_VECTORS = 64  # query vectors (rows x heads of a KV head) per item: what one transposed tile of K serves


@dataclass(frozen=True, slots=True)
class RowShape:
    """How a KV dtype's rows meet registers.

    line_items, line_bytes: dims and bytes in a page of one line, the piece of V that a strip takes: a register, or a
    group of codes. parts: registers of its accumulator. word_items: dims in 4 bytes of a row of K. planes: runs of q
    that one run of K's words is multiplied by. numbers: scale and minimum of a group; 0 where rows hold plain numbers.
    """

    line_items: int
    line_bytes: int
    parts: int
    word_items: int
    planes: int
    numbers: int

    @classmethod
    def of(cls, kv_dtype: str) -> "RowShape":
        """The shape of a KV dtype's rows."""
        return ROW_SHAPES[kv_dtype]

    @property
    def has_codes(self) -> bool:
        """Whether a line is a group of codes with a scale of its own."""
        return self.numbers > 0

    @property
    def acc_bytes(self) -> int:
        """Of one line's accumulator, float32 per dim."""
        return LINE_BYTES * self.parts

    @property
    def group_words(self) -> int:
        """Words of K that share a scale; all of a block where there is none."""
        return self.line_bytes // 4 if self.has_codes else LANES

    def lines(self, head_dim: int) -> int:
        """Lines of one row, the last one padded."""
        return -(-head_dim // self.line_items)


ROW_SHAPES = {
    "fp32": RowShape(16, LINE_BYTES, 1, 1, 1, 0),
    "bf16": RowShape(32, LINE_BYTES, 2, 2, 1, 0),
    "q8": RowShape(GROUP_DIMS["q8"], 64, 4, 4, 2, GROUP_NUMBERS["q8"]),
    "q4": RowShape(GROUP_DIMS["q4"], 16, 2, 8, 4, GROUP_NUMBERS["q4"]),
}


@dataclass(frozen=True, slots=True)
class DecodeTiles:
    """Register tiles of decode for one head shape; a kernel is compiled for each.

    score_heads, value_heads: query heads that share keys, a strip of V. words: of K's rows in a block that is
    transposed, 0 where keys are multiplied as they lie.
    """

    score_heads: int
    value_heads: int
    words: int

    @classmethod
    def of(cls, kv_dtype: str, queries_per_kv: int, head_dim: int, isa: "Isa") -> "DecodeTiles":
        """For this many query heads per KV head. Blocks of codes are whole: no scale is read beyond a row's.

        Without AVX-512 registers are narrower or fewer: fewer heads' sums fit in them.
        """
        shape, padded = RowShape.of(kv_dtype), padded_heads(queries_per_kv)
        if not shape.has_codes:
            most = 8 if padded % 8 == 0 else min(padded, 4)
            fitting = most if isa.has_avx512 else min(most, NARROW_VALUES)
            # Folding a row's sums pays where it is widened, long or read from memory by few heads, not by one alone.
            is_folded = fitting == 4 or (fitting == 8 and head_dim >= LONG_ROW)
            is_transposed = kv_dtype == "bf16" and isa.has_bf16 and not is_folded
            return cls(fitting, fitting, LANES if is_transposed else 0)
        row_words = shape.lines(head_dim) * shape.group_words
        words = next(words for words in (16, 8, 4) if row_words % words == 0)
        return cls(min(padded, JOINED_SCORES), min(padded, joined_values(kv_dtype, isa)), words)


def joined_values(kv_dtype: str, isa: "Isa") -> int:
    """Query vectors of several rows that share a strip of V."""
    is_narrow_q4 = kv_dtype == "q4" and not isa.has_avx512  # whose rows are not taken in quarters of a line
    return 2 if is_narrow_q4 else 4


def q_line_bytes(kv_dtype: str, has_bf16: bool) -> int:
    """Working memory of one line of q: rounded to bf16 it is kept as float32 where the CPU cannot multiply bf16."""
    shape = RowShape.of(kv_dtype)
    return shape.line_bytes * shape.planes * (2 if kv_dtype == "bf16" and not has_bf16 else 1)


def whole_pages(size: int) -> int:
    """Bytes rounded up to 4096, so that threads share no line."""
    return -(-size // 4096) * 4096


def padded_heads(queries_per_kv: int) -> int:
    """Query heads per KV head, padded to whole score tiles."""
    return queries_per_kv if queries_per_kv <= 2 else -(-queries_per_kv // 4) * 4


# Working memory of one query head: scores as float32; codes' weights, two planes; its scalars: what its acc is
# multiplied by, what its strip is multiplied by, what is added, the scale of its codes, the weight of a tile's p;
# and its state (m, l).
HEAD_SCORES, HEAD_WEIGHTS, HEAD_SCALARS, HEAD_STATE = 4 * KEY_TILE, 2 * KEY_TILE, 32, 8
SCALE_OF_STRIP, OFFSET_OF_STRIP, SCALE_OF_Q, WEIGHT_OF_TILE = 4, 8, 12, 16  # bytes into the scalars
BOUNDS_BYTES = 16  # the keys of a row of an item of decode: the first one and where they end, int64


def vectors_at_once(words: int) -> int:
    """Query vectors of an item of decode that take a tile together, if they are more than a row's heads; words: of
    DecodeTiles."""
    return BLOCK_VECTORS if words else ROW_VECTORS


def decode_thread_bytes(
    kv_dtype: str, has_bf16: bool, words: int, rows: int, kv_heads: int, queries_per_kv: int, head_dim: int
) -> int:
    """Working memory of one thread of decode, for items of so many rows.

    Bounds of every row; scores and weights of the query vectors that take a tile; scales and minima of its keys; then
    of every KV head its query vectors' q, scalars, sums of q per group of codes, and states.
    """
    shape, lines, heads = RowShape.of(kv_dtype), RowShape.of(kv_dtype).lines(head_dim), padded_heads(queries_per_kv)
    vectors = max(heads, vectors_at_once(words))
    tile = vectors * (HEAD_SCORES + HEAD_WEIGHTS) + lines * shape.numbers * 4 * KEY_TILE
    query = rows * heads * (lines * (q_line_bytes(kv_dtype, has_bf16) + 4) + HEAD_SCALARS + HEAD_STATE)
    return whole_pages(BOUNDS_BYTES * ROWS_TOGETHER + tile + kv_heads * (query + LINE_BYTES) + 8 * LINE_BYTES)


def decode_part_bytes(kv_dtype: str, queries_per_kv: int, head_dim: int) -> int:
    """The partial result of one row, KV head and split: acc of every head, then their states."""
    heads, shape = padded_heads(queries_per_kv), RowShape.of(kv_dtype)
    return heads * shape.lines(head_dim) * shape.acc_bytes + state_bytes(heads)


def state_bytes(heads: int) -> int:
    """Bytes of one row's states of a KV head, in whole lines, so that threads share none."""
    return -(-HEAD_STATE * heads // LINE_BYTES) * LINE_BYTES


def prefill_rows(queries_per_kv: int) -> int:
    """Query rows per item of prefill."""
    return max(1, PREFILL_VECTORS // queries_per_kv)


def prefill_vectors(queries_per_kv: int) -> int:
    """Query vectors per item of prefill, padded to whole passes over V."""
    return -(-prefill_rows(queries_per_kv) * queries_per_kv // PREFILL_VALUES) * PREFILL_VALUES


@cache
def prefill_thread_bytes(kv_dtype: str, has_bf16: bool, queries_per_kv: int, head_dim: int) -> int:
    """Working memory of one thread of prefill.

    K transposed; K and V of a tile as bf16, where pages hold codes; scores and scalars of one pass; queries,
    acc and (m, l) of every vector.
    """
    shape, wide = RowShape.of(kv_dtype), RowShape.of(wide_dtype(kv_dtype))
    q_line = q_line_bytes(wide_dtype(kv_dtype), has_bf16)
    lines = wide.lines(shape.lines(head_dim) * shape.line_items)
    widened = 2 * LINE_BYTES * lines * KEY_TILE if shape.has_codes else 0
    scores = PREFILL_VALUES * (HEAD_SCORES + HEAD_SCALARS)
    vectors = prefill_vectors(queries_per_kv) * (lines * (q_line + wide.acc_bytes) + 8)
    return whole_pages(LINE_BYTES * lines * KEY_TILE + widened + scores + vectors + 8 * LINE_BYTES)


def wide_dtype(kv_dtype: str) -> str:
    """What prefill multiplies rows of this dtype as: codes are widened to bf16."""
    return "bf16" if RowShape.of(kv_dtype).has_codes else kv_dtype
