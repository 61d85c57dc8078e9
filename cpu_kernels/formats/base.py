"""What a format of packed weights is.

A packed weight is uint8 [num_blocks, block_bytes], contiguous. A block holds BLOCK_FEATURES = 16 consecutive output
features; features that a weight does not have are zero rows.

Row-major formats (planes f32, f16, bf16): a block is [16, in_features] in that dtype.

Coded formats: in_features is padded with zeros to whole superblocks of `group_inputs` inputs, which follow each other.
A superblock is `header_lines` lines of 64 bytes and then, for every 64 inputs, the lines of its code plane. Lines
interleave the 16 features, so that a vector register holds the same inputs of all of them.

  plane   lines per 64 inputs, after the header
  u4, t4  8: line j, byte 4f+i: low nibble input 8j+i of feature f, high nibble input 8j+4+i. Of t4 a nibble is an index
          into `table`, 16 unsigned bytes that are the code.
  u5      the 8 of u4, then 2: line h, byte 4f+i: bits 2k and 2k+1 are bit 4 of the codes in byte 4f+i of line 4h+k, low
          nibble first.
  u6      the 8 of u4, then 4: line h, byte 4f+i: bits 4k, 4k+1 and 4k+2, 4k+3 are bits 4 and 5 of the codes in byte
          4f+i of line 2h+k, low nibble first.
  i8, f8  16: line j, byte 4f+i: input 4j+i of feature f. Of f8 a code is the number that it is as float8 E4M3.
  v4      as u4; a nibble is an index into `values`, 16 float32 numbers that are the code.
  b4, b5, b6, bt   as i8, of the codes of u4, u5, u6 and t4: in working memory alone (linear/forms/spread.py).
  m8, mt  34, of i8 and t4, likewise: of every word, in place of its line, |c - 128| and then 255 where c < 128, else 0;
          then int32, where sums of inputs 0..31 and of 32..63 begin (linear/forms/flips.py).

  header  value of code c                       header lines, of 16 numbers a feature each unless said otherwise
  S32     (c - offset) * s                      float16 s of inputs 0..31, of 32..63
  SM32    c * s + m                             as S32; then float16 m of 0..31, of 32..63
  SM64    c * s + m                             float16 s, float16 m
  K2M32   (d * s) * c - dmin * m                float16 d, float16 dmin; 8 runs of u8 s, for 32 inputs each; 8 of u8 m
  K2S16   (d * s) * (c - offset)                float16 d, 32 bytes unused; 16 runs of int8 s, one for every 16 inputs
  K2S32   (d * s) * (c - offset)                float16 d, 32 bytes unused; 8 runs of int8 s, one for every 32 inputs
  SZ32, SZ64, SZ128   (c - z) * s               of every 32, 64 or 128 inputs: all float16 s, then 16-byte runs of u8 z
  SI32, SI64, SI128   (c - offset - z) * s      as SZ, of int8 z
  E32     (c - offset) * 2^(e - 128)            4 runs of u8 e, one for every 32 inputs
  F32, F64, F128   (c - offset) * s             float32 s of every 32, 64 or 128 inputs
  T16     (c - offset) * s                      float32 t; 16 runs of u8 e, one for every 16 inputs: with v the 256th of
                                                float8 E4M3 e, s is v * t, or v / -t where t is below 0
"""

from dataclasses import dataclass

BLOCK_FEATURES = 16
GROUP_INPUTS = 64  # inputs that share one scale of the activations
LINE_BYTES = 64
ROW_MAJOR_ITEM_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
LARGEST_CODES = {"u4": 15, "u5": 31, "u6": 63, "i8": 255, "f8": 255, "v4": 15, "b4": 15, "b5": 31, "b6": 63, "m8": 255}
CODE_LINES = {"u4": 8, "t4": 8, "v4": 8, "u5": 10, "u6": 12, "i8": 16, "f8": 16, "b4": 16, "b5": 16, "b6": 16, "bt": 16}
CODE_LINES |= {"m8": 34, "mt": 34}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """One way to pack weights; the module's text says what the fields mean in bytes.

    name: how plans, policies and ops call it. plane, header, header_lines: of a coded format, header "" of a row-major
    one. group_inputs: inputs of a superblock; only at its multiples may a weight be cut by rows. offset: taken from
    every code. table: codes of a t4 plane. values: of a v4 plane. rounds_x_to: what activations become before they are
    multiplied, "fp32",
    "bf16" or "int8" (per group of 64). like: a format whose rates are taken where this one's were not measured.
    """

    name: str
    plane: str
    rounds_x_to: str
    like: str
    header: str = ""
    header_lines: int = 0
    group_inputs: int = 1
    offset: int = 0
    table: tuple[int, ...] = ()
    values: tuple[float, ...] = ()

    @property
    def has_float_codes(self) -> bool:
        """Whether codes are floating-point numbers, which no integer dot product can take."""
        return self.plane in ("f8", "v4")

    @property
    def has_zero_points(self) -> bool:
        """Whether a header holds zero points, which are taken from codes as an offset is."""
        return self.header.startswith(("SZ", "SI"))

    @property
    def largest_code(self) -> int:
        """The largest unsigned byte that a code of a coded format can be."""
        return max(self.table) if self.table else LARGEST_CODES[self.plane]

    @property
    def is_row_major(self) -> bool:
        """Whether a block is plain rows of numbers."""
        return self.plane in ROW_MAJOR_ITEM_BYTES

    @property
    def item_bytes(self) -> int:
        """Bytes of one number of a row-major format."""
        return ROW_MAJOR_ITEM_BYTES[self.plane]

    @property
    def code_lines(self) -> int:
        """Lines of the code plane for 64 inputs, of a coded format."""
        return CODE_LINES[self.plane]

    @property
    def superblock_bytes(self) -> int:
        """Bytes of one superblock of a coded format."""
        return (self.header_lines + self.group_inputs // GROUP_INPUTS * self.code_lines) * LINE_BYTES

    def padded_inputs(self, in_features: int) -> int:
        """Inputs stored for each feature."""
        return -(-in_features // self.group_inputs) * self.group_inputs

    def block_bytes(self, in_features: int) -> int:
        """Bytes of one block of 16 output features."""
        if self.is_row_major:
            return BLOCK_FEATURES * in_features * self.item_bytes
        return -(-in_features // self.group_inputs) * self.superblock_bytes

    def bits_per_weight(self) -> float:
        """Bits of a weight, headers included."""
        if self.is_row_major:
            return 8.0 * self.item_bytes
        return 8.0 * self.superblock_bytes / (BLOCK_FEATURES * self.group_inputs)
