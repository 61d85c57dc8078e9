"""What every op tells its kernel, by name: the one declaration that a wrapper fills and a kernel reads.

A call is a block of 64-bit words: addresses, sizes, strides in bytes, floats by their bits. The first word of every
block is `scratch`, the address of the call's working memory, which the team fills in. A declared block holds the place
of each of its words:

    wrapper    team.run(kernel, scratch_bytes, *SWEEP.filled(address=tensor.data_ptr(), size=tensor.nbytes))
    kernel     address = parameter(arguments, SWEEP.address)

A name that is not declared and a word that is not filled are errors where they stand. What a word's name says needs no
more: `x_row` is the stride from one row of x to the next, `k_page` that from one page of K to the next.
"""

from collections import namedtuple
from typing import Any, cast

MERGE_PARTS = 14  # partials that one call merges


def block(name: str, *words: str) -> Any:
    """Declare the words of a call, names with spaces between them: a named tuple of their places.

    Its `filled` takes every word but `scratch` by name and returns them in order; TypeError for one too many or too
    few.
    """
    names = " ".join(words).split()
    # Numba knows the fields of a named tuple as constants; type checkers know none that is made at run time.
    places = cast(Any, namedtuple)(name, ("scratch", *names))
    filled = eval(f"lambda *, {', '.join(names)}: ({', '.join(names)},)")  # half the time of a call with **words
    filled.__name__ = filled.__qualname__ = f"{name}.filled"
    places.filled = staticmethod(filled)
    return places(*range(1 + len(names)))


# piece: inputs that panels of rows are multiplied with at a time. smallest: fewest blocks of a range; parts: what the
# remaining blocks are divided into for the next one. A format has one run of blocks; of a mix, whose units have blocks
# of several formats, each format is a call of its own with one run a unit: run is its blocks, weight_run and out_run
# lead from one to the next. bias: 0 for none. spread: where in the working memory codes are spread to bytes, 0 for
# nowhere.
_LINEAR = (
    "x x_row in_features weight num_blocks block_bytes bias out out_row accumulate",
    "piece smallest run weight_run out_run spread",
)
LINEAR = block("LINEAR", *_LINEAR, "rows parts")  # what both read is in the same places
# sources: 0 where a pick's input is the row of its place. first, count: the experts that `weight` holds, one every
# expert_bytes. num_blocks: of one expert. bias, accumulate: 0.
EXPERT_LINEAR = block("EXPERT_LINEAR", *_LINEAR, "sources starts first count expert_bytes threads")
# row_items: of a row, inputs or a file's blocks.
PACK = block("PACK", "rows row_bytes num_blocks row_items out block_bytes")
UNPACK = block("UNPACK", "weight block_bytes rows ids count in_features out out_row")
RMS_NORM = block("RMS_NORM", "x x_row weight eps out out_row rows hidden")
COPY_ROWS = block("COPY_ROWS", "source source_row target target_row rows features")
# bias: 0 for none.
LAYER_NORM = block("LAYER_NORM", "x x_row weight bias eps out out_row rows hidden")
GATED = block("GATED", "gate_up gate_up_row out out_row rows units")
CLAMPED = block("CLAMPED", "gate_up gate_up_row out out_row rows units alpha limit")
GELU = block("GELU", "x x_row out out_row rows features")
GATHER = block("GATHER", "x x_row order out out_row rows features")
# Then out and lse of every partial, all contiguous.
MERGE = block("MERGE", "count out lse rows head_dim", *(f"part_{part} part_lse_{part}" for part in range(MERGE_PARTS)))
# router_rows: of the router, padded. ids, places and sources are contiguous. bias, correction: 0 for none.
ROUTE = block(
    "ROUTE",
    "x x_row rows hidden router experts router_rows top_k normalise gated ids places sources starts",
    "weights weights_row sigmoid bias correction groups kept_groups eps scale",
)
# border: address of the first place that is of `far`.
COMBINE = block(
    "COMBINE", "near near_row far far_row border places weights weights_row out out_row rows picks features"
)
# first, count: the experts that `bias` has.
EXPERT_BIAS = block("EXPERT_BIAS", "bias bias_row starts first count out out_row features")
SINKS = block("SINKS", "sinks out out_row out_head lse lse_row rows heads head_dim")
SIGMOID_MUL = block("SIGMOID_MUL", "gate gate_row gate_unit out out_row out_unit rows units features")
SCALE_ROWS = block("SCALE_ROWS", "factors factor_row out out_row rows features")
NORM_HEADS = block("NORM_HEADS", "qkv qkv_row qkv_unit rows kv_heads q_width k_width q_norm k_norm eps")
# head_bytes: working memory of a key head. taps_row: also the stride of kept inputs. ids: int64, contiguous. spares:
# rows of spare, 0 where there is none.
DELTA = block(
    "DELTA",
    "x x_row x_head gates gates_row rows key_heads values_per_key key_dim value_dim conv taps_row taps",
    "rates dt_bias norm eps states states_row sequences spare spare_row spares ids out out_row out_key out_value",
    "head_bytes",
)
SWEEP = block("SWEEP", "address size")
# q_norm, k_norm: 0 for none. half: of the rotated dims. block, factor: of the Hadamard matrix of quantised rows.
ROPE = block(
    "ROPE",
    "qkv qkv_row qkv_unit rows kv_heads queries_per_kv head_dim half positions max_positions cos sin angle_row",
    "q_norm k_norm eps q q_row q_head k k_page k_row v v_page v_row num_slots page_size slots slots_row",
    "row_bytes block factor",
)
# k_row, v_row: of quantised pages, of the codes of one token. threads, thread_bytes: working memory of each.
_ATTENTION = (
    "q q_row q_head rows kv_heads queries_per_kv head_dim k k_page k_row v v_page v_row num_pages page_size",
    "table table_row table_head max_pages start stop scale cap out out_row out_head lse lse_row threads thread_bytes",
)
ATTENTION = block("ATTENTION", *_ATTENTION)  # what both read, in the same places
# start, stop: addresses, one of every row. splits: the most of a row's keys; items: wanted of a row, so that all
# threads have work; most_items: that a row may have.
DECODE = block("DECODE", *_ATTENTION, "splits items most_items")
# start, stop: of all rows. q_start: the position of row 0.
PREFILL = block("PREFILL", *_ATTENTION, "q_start window")
FLAG = block("FLAG", "address value")  # an entry of a program that waits for a flag or sets it

MAX_PARAMETERS = max(
    map(
        len,
        (LINEAR, EXPERT_LINEAR, PACK, UNPACK, RMS_NORM, LAYER_NORM, GATED, CLAMPED, GELU, GATHER, MERGE)
        + (ROUTE, COMBINE, EXPERT_BIAS, SINKS, SIGMOID_MUL, SCALE_ROWS, NORM_HEADS, SWEEP, ROPE, DECODE, PREFILL, FLAG)
        + (COPY_ROWS, DELTA),
    )
)
