"""Parameters and working memory that the attention kernels and their wrappers share. Strides and sizes are in bytes."""

from dataclasses import dataclass

from .kv_layout import GROUP_DIMS, GROUP_NUMBERS, is_quantised, num_groups

KEY_TILE = 64  # keys of one tile: a run of rows of one page
LINE_BYTES = 64

(
    P_Q,
    P_Q_ROW,
    P_Q_HEAD,
    P_BATCH,
    P_GROUPS,
    P_HEADS,  # query heads per group
    P_HEAD_DIM,
    P_K,
    P_K_PAGE,
    P_K_ROW,  # of quantised pages: codes of one token
    P_V,
    P_V_PAGE,
    P_V_ROW,
    P_NUM_PAGES,
    P_PAGE_SIZE,
    P_TABLE,
    P_TABLE_ROW,
    P_TABLE_GROUP,
    P_MAX_PAGES,
    P_START,
    P_STOP,
    P_SCALE,  # float64
    P_OUT,
    P_OUT_ROW,
    P_OUT_HEAD,
    P_LSE,
    P_LSE_ROW,
    P_SPLITS,
    P_THREADS,
    P_THREAD_BYTES,
    P_Q_START,  # prefill only, as are the next: position of row 0
    P_WINDOW,
) = range(1, 33)

PREFILL_SCORES = 4  # query vectors per score tile: 4 x 64 keys fill 16 registers
PREFILL_VALUES = 8  # query vectors per pass over V
PREFILL_VECTORS = 64  # query vectors (rows x heads of a group) per item: what one transposed tile of K serves


@dataclass(frozen=True, slots=True)
class RowShape:
    """How a KV dtype's rows meet registers.

    line_items: dims of one line. line_bytes: its bytes in a page. acc_bytes: its accumulator, float32 per dim: of fp32
    one register in order, else the even dims in one and the odd dims in another. group_lines: lines that share a
    scale, 0 where there is none. numbers: scale and minimum of a group.
    """

    line_items: int
    line_bytes: int
    acc_bytes: int
    group_lines: int
    numbers: int

    @classmethod
    def of(cls, kv_dtype: str) -> "RowShape":
        """The shape of a KV dtype's rows."""
        if kv_dtype == "fp32":
            return cls(16, LINE_BYTES, 64, 0, 0)
        line_bytes = {"bf16": 64, "q8": 32, "q4": 16}[kv_dtype]
        return cls(32, line_bytes, 128, GROUP_DIMS.get(kv_dtype, 0) // 32, GROUP_NUMBERS.get(kv_dtype, 0))

    def lines(self, head_dim: int) -> int:
        """Lines of one row, the last one padded."""
        return -(-head_dim // self.line_items)


def row_lines(kv_dtype: str, head_dim: int) -> int:
    """Lines that a row takes in memory: whole groups where there are any."""
    shape = RowShape.of(kv_dtype)
    return num_groups(kv_dtype, head_dim) * shape.group_lines if shape.group_lines else shape.lines(head_dim)


def whole_pages(size: int) -> int:
    """Bytes rounded up to 4096, so that threads share no line."""
    return -(-size // 4096) * 4096


def head_tiles(group_heads: int) -> tuple[int, int]:
    """(heads per score tile, heads per value strip) for this many query heads per group."""
    score_heads = 1 if group_heads == 1 else 2 if group_heads == 2 else 4
    padded = padded_heads(group_heads)
    return score_heads, 8 if padded % 8 == 0 else score_heads


def padded_heads(group_heads: int) -> int:
    """Query heads per group, padded to whole score tiles."""
    return group_heads if group_heads <= 2 else -(-group_heads // 4) * 4


# Working memory of one query head: scores as float32, then as the value strip multiplies them; and its scalars: what
# its acc is multiplied by, what its strip is multiplied by, what is added, and the scale of its codes.
HEAD_SCORES, HEAD_WEIGHTS, HEAD_SCALARS = 4 * KEY_TILE, 2 * KEY_TILE, 16


def head_bytes(kv_dtype: str, head_dim: int) -> int:
    """Working memory of one query head of decode: scores, weights, scalars, q lines and the sums of q per group."""
    lines = row_lines(kv_dtype, head_dim)
    return HEAD_SCORES + HEAD_WEIGHTS + HEAD_SCALARS + lines * LINE_BYTES + 4 * lines


def decode_thread_bytes(kv_dtype: str, group_heads: int, head_dim: int) -> int:
    """Working memory of one thread of decode: every head's, then scales and minima of a tile's keys."""
    numbers = num_groups(kv_dtype, head_dim) * GROUP_NUMBERS[kv_dtype] if is_quantised(kv_dtype) else 0
    heads = padded_heads(group_heads) * head_bytes(kv_dtype, head_dim)
    return whole_pages(heads + numbers * 4 * KEY_TILE + 8 * LINE_BYTES)


def decode_item_bytes(kv_dtype: str, group_heads: int, head_dim: int) -> int:
    """One item's partial result: acc of every head, then (m, l) of every head."""
    heads = padded_heads(group_heads)
    return heads * row_lines(kv_dtype, head_dim) * RowShape.of(kv_dtype).acc_bytes + -(-8 * heads // 64) * 64


def prefill_rows(group_heads: int) -> int:
    """Query rows per item of prefill."""
    return max(1, PREFILL_VECTORS // group_heads)


def prefill_vectors(group_heads: int) -> int:
    """Query vectors per item of prefill, padded to whole passes over V."""
    return -(-prefill_rows(group_heads) * group_heads // PREFILL_VALUES) * PREFILL_VALUES


def prefill_thread_bytes(kv_dtype: str, group_heads: int, head_dim: int) -> int:
    """Working memory of one thread of prefill.

    K transposed; K and V of a tile as bf16, where pages hold codes; scores and scalars of one pass; queries,
    acc and (m, l) of every vector.
    """
    lines = row_lines(kv_dtype, head_dim)
    widened = 2 * LINE_BYTES * lines * KEY_TILE if is_quantised(kv_dtype) else 0
    scores = PREFILL_VALUES * (HEAD_SCORES + HEAD_SCALARS)
    vectors = prefill_vectors(group_heads) * (lines * (LINE_BYTES + RowShape.of(kv_dtype).acc_bytes) + 8)
    return whole_pages(LINE_BYTES * lines * KEY_TILE + widened + scores + vectors + 8 * LINE_BYTES)
