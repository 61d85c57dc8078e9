"""Parameters and working memory that the attention kernels and their wrappers share. Strides and sizes are in bytes."""

KEY_TILE = 64
LINE_BYTES = 64
NEXT_TILE = 8 * KEY_TILE  # from a row address to the one of the same key in the next tile
THREAD_ADDRESSES = 4 * NEXT_TILE  # K and V row addresses of this tile of keys and the next

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
    P_K_ROW,
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


def prefill_rows(group_heads: int) -> int:
    """Query rows per item of prefill."""
    return max(1, PREFILL_VECTORS // group_heads)


def prefill_vectors(group_heads: int) -> int:
    """Query vectors per item of prefill, padded to whole passes over V."""
    return -(-prefill_rows(group_heads) * group_heads // PREFILL_VALUES) * PREFILL_VALUES


def prefill_thread_bytes(kv_item_bytes: int, group_heads: int, head_dim: int) -> int:
    """Working memory of one thread of prefill: addresses, K transposed, scores, queries, acc, (m, l), corrections."""
    vectors, line_items = prefill_vectors(group_heads), LINE_BYTES // kv_item_bytes
    padded = -(-head_dim // line_items) * line_items
    keys_bytes = padded * kv_item_bytes * KEY_TILE
    scores_bytes = PREFILL_VALUES * (4 * KEY_TILE + 8)
    used = THREAD_ADDRESSES + keys_bytes + scores_bytes + vectors * (padded * (kv_item_bytes + 4) + 8) + 4 * LINE_BYTES
    return -(-used // 4096) * 4096


def head_tiles(group_heads: int) -> tuple[int, int]:
    """(heads per score tile, heads per value strip) for this many query heads per group."""
    score_heads = 1 if group_heads == 1 else 2 if group_heads == 2 else 4
    padded = padded_heads(group_heads)
    return score_heads, 8 if padded % 8 == 0 else score_heads


def padded_heads(group_heads: int) -> int:
    """Query heads per group, padded to whole score tiles."""
    return group_heads if group_heads <= 2 else -(-group_heads // 4) * 4


def thread_bytes(group_heads: int, head_dim: int) -> int:
    """Working memory of one thread: addresses, corrections, scores, queries."""
    heads = padded_heads(group_heads)
    used = THREAD_ADDRESSES + 128 + 4 * heads + 4 * KEY_TILE * heads + heads * (4 * head_dim + LINE_BYTES)
    return -(-used // 4096) * 4096


def item_bytes(kv_item_bytes: int, group_heads: int, head_dim: int) -> int:
    """One item's partial result: acc of every head, then (m, l) of every head."""
    heads, line_items = padded_heads(group_heads), LINE_BYTES // kv_item_bytes
    return heads * -(-head_dim // line_items) * line_items * 4 + -(-8 * heads // 64) * 64
