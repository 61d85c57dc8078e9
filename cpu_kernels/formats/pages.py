"""The KV page format, described once: every lane reads and writes these bytes.

The pages of K, and those of V, are one tensor [num_pages, page_size, row_items] whose torch dtype says what they hold:

  fp32 float32, bf16 bfloat16   a row is one token's head_dim numbers
  q8 int8, q4 uint8             a row is `row_items` bytes, but they are laid out by page, not by token; the bytes of a
                                page are contiguous

A quantised page, with head_dim padded to whole groups of GROUP_DIMS (64 for q8, 32 for q4):

  codes   [page_size, padded head_dim]: q8 int8 -127..127; q4 two in a byte, dim 2i in the low nibble of byte i
  scales  [groups, page_size] bfloat16, of every token together so that a vector register loads 16 tokens' scales
  minima  [groups, page_size] bfloat16, q4 only

  q8   scale = bf16(absmax / 127), code = round(x / scale), x ~ code * scale
  q4   minimum = bf16(min), scale = bf16((max - minimum) / 15), code = round((x - minimum) / scale),
       x ~ code * scale + minimum

Divisions are float32 and correctly rounded, rounding is to nearest even, codes are clamped to their range, and a scale
of 0 gives the code 0; so every lane writes the same bytes for the same numbers. Padding is code 0 and takes no part in
min and max. A q4 group is half as long as a q8 one: of normal keys the error of attention is 0.13 of its size instead
of 0.15, and 5 bits a number instead of 4.5 are the price.

Keys have a few channels far larger than the rest, and a scale that fits them is too coarse for the other dims of their
group. So a quantised page holds a key as k H, where k has its rotary embedding and H is an orthonormal Walsh-Hadamard
matrix, and rope_append returns the query as q H: (q H) . (k H) = q . k, and the large channels are spread evenly over
all dims. Values are stored as they are. H is block-diagonal, its blocks of B dims, the largest power of two that
divides head_dim:

  for stride = 1, 2, 4, ... < B     (x_i, x_{i + stride}) <- (x_i + x_{i + stride}, x_i - x_{i + stride})
                                    for every dim i whose bit `stride` is 0
  at the end                        x_i <- x_i * float32(1 / sqrt(B))

all in float32, each sum and the product rounded once, so that every lane rounds alike. With six channels of 128 that
are 20 to 50 times the rest, the error of attention is 0.19 of its size instead of 0.32 in q4, 0.013 instead of 0.042 in
q8. The idea is QuaRot's, arXiv 2404.00456.

This file is pure Python: a planner may import it on a machine that has no compiler.
"""

KV_DTYPES = ("fp32", "bf16", "q8", "q4")
ITEM_BYTES = {"fp32": 4, "bf16": 2, "q8": 1, "q4": 1}
GROUP_DIMS = {"q8": 64, "q4": 32}
CODES_PER_BYTE = {"q8": 1, "q4": 2}
GROUP_NUMBERS = {"q8": 1, "q4": 2}  # scale; scale and minimum
NUMBER_BYTES = 2


def check_kv_dtype(kv_dtype: str) -> None:
    """Raises ValueError unless `kv_dtype` is one of KV_DTYPES."""
    if kv_dtype not in KV_DTYPES:
        raise ValueError(f"kv_dtype is {kv_dtype!r}; it must be one of {', '.join(KV_DTYPES)}")


def is_quantised(kv_dtype: str) -> bool:
    """Whether pages hold codes and scales rather than plain numbers."""
    check_kv_dtype(kv_dtype)
    return kv_dtype in GROUP_DIMS


def num_groups(kv_dtype: str, head_dim: int) -> int:
    """Groups of dims with a scale of their own in one quantised row."""
    return -(-head_dim // GROUP_DIMS[kv_dtype])


def hadamard_block(kv_dtype: str, head_dim: int) -> int:
    """Dims of a key that are mixed with each other before they are stored; 1 where nothing is mixed."""
    return head_dim & -head_dim if is_quantised(kv_dtype) else 1


def code_bytes(kv_dtype: str, head_dim: int) -> int:
    """Bytes of one quantised row's codes, padding included."""
    return num_groups(kv_dtype, head_dim) * GROUP_DIMS[kv_dtype] // CODES_PER_BYTE[kv_dtype]


def row_items(kv_dtype: str, head_dim: int) -> int:
    """Last dimension of a page tensor: items of its torch dtype for one token of one KV head."""
    if not is_quantised(kv_dtype):
        return head_dim
    numbers = num_groups(kv_dtype, head_dim) * GROUP_NUMBERS[kv_dtype]
    return code_bytes(kv_dtype, head_dim) + numbers * NUMBER_BYTES


def token_bytes(kv_dtype: str, head_dim: int) -> int:
    """Bytes of K plus V of one token and KV head: what a plan counts and a page takes."""
    return 2 * row_items(kv_dtype, head_dim) * ITEM_BYTES[kv_dtype]
