"""Which linears of few rows multiply a weight as it lies, in one launch; whoever counts launches needs no Triton."""

from gpu_kernels.forms.unpack import FORMS

# Rows beyond this read the weight's bytes from the L2 cache as often as its bf16 would take to be written and read.
MOST_ROWS = 8


def is_read_as_it_lies(rows: int, weight_dtype: str, in_features: int) -> bool:
    """Whether `linear` multiplies so many rows with a coded or float16 weight without making a dense one of it first.

    q8 and q4 have a bound of their own, which depends on the card: `int8_rows` of `rounded`.
    """
    is_taken = in_features % 2 == 0 if weight_dtype == "fp16" else weight_dtype in FORMS
    return is_taken and rows <= MOST_ROWS
