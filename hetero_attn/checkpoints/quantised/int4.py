"""One quantised linear: its tensors in the file, checked, and rows of it in the order that everything else has.

  method               codes                              scales         zero points
  gptq                 qweight [in/8, out], along inputs  [groups, out]  qzeros [groups, out/8], along outputs
  awq (gemm)           qweight [in, out/8]                [groups, out]  qzeros [groups, out/8]
  compressed-tensors   weight_packed [out, in/8]          [out, groups]  weight_zero_point [out/8, groups]

All int32, eight codes each, the lowest bits first; awq has output 8c + i of its words at nibble 0 4 1 5 2 6 3 7. gptq
of 8 bits has four codes in each; symmetric ones are rows of Q8_0 with other headers. Where act-order scattered groups
over the inputs, g_idx says which group each input is of; rows have their inputs sorted by it, so that groups are runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from cpu_kernels.formats import INT4_GROUPS, INT4_TYPES, SOURCE_TYPES, UINT8_TYPES, GgufType
from hetero_attn.checkpoints.quantised.module import (
    AGAIN,
    INSTEAD,
    Module,
    Read,
    RowWriter,
    Shapes,
    check_dtype,
    check_said_shape,
    matrix,
    needed,
    refuse,
    refuse_shape,
    unsupported,
    write_zeroed_blocks,
)
from hetero_attn.checkpoints.quantised.scheme import GroupScheme
from hetero_attn.checkpoints.quantised.words import AWQ_ORDER, IN_ORDER, nibbles, stored_rows
from hetero_attn.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    import torch

CODES, SCALES, ZEROS, GROUP_OF_INPUT, SHAPE = range(5)
PARTS = {
    "gptq": ("qweight", "scales", "qzeros", "g_idx", ""),
    "awq": ("qweight", "scales", "qzeros", "", ""),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape"),
}
DTYPES = (("I32",), ("F16", "BF16"), ("I32",), ("I32",), ("I64", "I32"))
WORD_BITS = 32
EIGHT_BITS = SOURCE_TYPES["Q8_0"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Module(Module):
    """parts: names of its tensors, "" of those that it does not have. group: inputs that share a scale, as they are
    held; file_group: in the file. is_scattered: whether groups are no runs of the model's inputs."""

    scheme: GroupScheme
    parts: tuple[str, ...]
    group: int
    file_group: int
    is_scattered: bool

    def input_order(self, read: Read) -> torch.Tensor | None:
        """See `Module.input_order`."""
        return read(self.parts[GROUP_OF_INPUT]).argsort(stable=True) if self.is_scattered else None

    def rows(self, read: Read, where: str) -> RowWriter:
        """See `Module.rows`."""
        codes, (scales, zeros) = read(self.parts[CODES]), self._groups(read, where)
        repeats, order = self.file_group // self.group, self.input_order(read)
        if self.kind is EIGHT_BITS:
            return self._eight_bit_blocks(codes, scales.repeat_interleave(repeats, 1).contiguous(), order)
        scales, zeros = (part.repeat_interleave(repeats, 1).contiguous() for part in (scales, zeros))
        return self._blocks(codes, scales, zeros, order)

    def _groups(self, read: Read, where: str) -> tuple[torch.Tensor, torch.Tensor]:
        """float16 scales and u8 zero points, [out, groups of the file]."""
        import torch

        scales = read(self.parts[SCALES])
        halves = scales.half()
        if not torch.equal(halves.float(), scales.float()) and torch.isfinite(scales).all():
            raise UnsupportedModelError(
                f"{where}: {self.parts[SCALES]} holds bfloat16 scales that float16 cannot hold exactly. {INSTEAD}"
            )
        halves = halves if self.scheme.method == "compressed-tensors" else halves.t()
        if not self.parts[ZEROS]:
            return halves, torch.full_like(halves, _middle(self.scheme)).byte()
        return halves, _zeros(self, read(self.parts[ZEROS]), where)

    def _blocks(
        self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, order: torch.Tensor | None
    ) -> RowWriter:
        def write(first: int, stop: int, out: torch.Tensor) -> None:
            rows = stored_rows(self.scheme, codes, first, stop, order)
            write_zeroed_blocks(scales[first:stop], zeros[first:stop], rows, out)

        return write

    def _eight_bit_blocks(self, codes: torch.Tensor, scales: torch.Tensor, order: torch.Tensor | None) -> RowWriter:
        """Rows of Q8_0: a float16 scale and 32 signed codes, those of the file less the zero point of all."""
        import torch

        def write(first: int, stop: int, out: torch.Tensor) -> None:
            target = out.view(stop - first, self.in_features // self.group, -1)
            target[:, :, :2] = scales[first:stop, :, None].view(torch.uint8)
            target[:, :, 2:] = (stored_rows(self.scheme, codes, first, stop, order) ^ 128).view(*target.shape[:2], -1)

        return write


def find_int4(prefix: str, scheme: GroupScheme, shapes: Shapes, where: str, read: Read) -> Int4Module:
    """A module by its tensors; only the order of groups is read. Raises CheckpointError or UnsupportedModelError."""
    names = _names(prefix, scheme, shapes, where)
    codes, groups = _sizes(scheme, matrix(where, shapes, names[CODES]), matrix(where, shapes, names[SCALES]))
    each = _file_group(prefix, scheme, codes[1], groups, where)
    for index, shape in _expected_shapes(scheme, codes, groups).items():
        if names[index] and shapes[names[index]][1] != shape:
            refuse_shape(where, shapes, names[index], list(shape))
    if name := names[SHAPE]:
        check_said_shape(where, name, read(name).tolist(), codes)
    scattered = bool(names[GROUP_OF_INPUT]) and _scattered(read(names[GROUP_OF_INPUT]), groups, each, names, where)
    held = form_of_groups(scheme, each) or _refuse_groups(prefix, scheme, each, where)
    return Int4Module(
        prefix=prefix,
        names=tuple(name for name in names if name),
        out_features=codes[0],
        in_features=codes[1],
        kind=held,
        scheme=scheme,
        parts=names,
        group=held.items,
        file_group=each,
        is_scattered=scattered,
    )


def _names(prefix: str, scheme: GroupScheme, shapes: Shapes, where: str) -> tuple[str, ...]:
    """The tensors of a module in the order of PARTS, "" for those that it does not have."""
    parts = PARTS[scheme.method]
    needs_zeros = scheme.method != "compressed-tensors" or not scheme.symmetric
    for index in (CODES, SCALES, ZEROS)[: 3 if needs_zeros else 2]:
        needed(where, shapes, prefix, parts[index], scheme.method)
    names = tuple(name if part and (name := f"{prefix}.{part}") in shapes else "" for part in parts)
    for name, dtypes in zip(names, DTYPES, strict=True):
        if name:
            check_dtype(where, shapes, name, dtypes)
    return names


def _sizes(scheme: GroupScheme, codes: tuple[int, int], scales: tuple[int, int]) -> tuple[tuple[int, int], int]:
    """Outputs and inputs of a weight, and the groups of its inputs, by the shapes of its codes and of its scales."""
    compressed, per_word = scheme.method == "compressed-tensors", WORD_BITS // scheme.bits
    rows, columns = codes if compressed else codes[::-1]
    weight = (rows * per_word, columns) if scheme.method == "awq" else (rows, columns * per_word)
    return weight, scales[1] if compressed else scales[0]


def _expected_shapes(scheme: GroupScheme, codes: tuple[int, int], groups: int) -> dict[int, tuple[int, ...]]:
    """The shapes of the other tensors, by their places in PARTS."""
    (out, inputs), words = codes, -(-codes[0] * scheme.bits // WORD_BITS)
    compressed = scheme.method == "compressed-tensors"
    return {
        SCALES: (out, groups) if compressed else (groups, out),
        ZEROS: (words, groups) if compressed else (groups, words),
        GROUP_OF_INPUT: (inputs,),
        SHAPE: (2,),
    }


def form_of_groups(scheme: GroupScheme, each: int) -> GgufType | None:
    """The form of rows in groups of `each` inputs, that of the largest groups that divide those; None where none is."""
    if scheme.bits == 8 and scheme.symmetric:
        return None if each % EIGHT_BITS.items else EIGHT_BITS
    fitting = [group for group in INT4_GROUPS if each == group or each % group == 0 and group == INT4_GROUPS[-1]]
    types = INT4_TYPES if scheme.bits == 4 else UINT8_TYPES
    return types[fitting[-1]] if fitting else None


def _file_group(prefix: str, scheme: GroupScheme, inputs: int, groups: int, where: str) -> int:
    if inputs % groups:
        raise CheckpointError(f"{where}: {prefix} has {inputs} inputs and scales for {groups} groups of them; {AGAIN}")
    each = inputs // groups
    if each != (scheme.group or inputs):
        raise CheckpointError(
            f"{where}: {prefix} has {groups} scales for {inputs} inputs, but group_size in config.json is "
            f"{scheme.group or -1}; {AGAIN}"
        )
    return each


def _refuse_groups(prefix: str, scheme: GroupScheme, each: int, where: str) -> NoReturn:
    known = f"run are groups of {', '.join(map(str, INT4_GROUPS))} and whole multiples of {INT4_GROUPS[-1]}"
    if scheme.bits == 8 and scheme.symmetric:
        known = f"of 8 bits multiples of {EIGHT_BITS.items} are run"
    unsupported(where, f"{prefix} has groups of {each} inputs; {known}")


def _scattered(found: torch.Tensor, groups: int, each: int, names: tuple[str, ...], where: str) -> bool:
    """Whether groups are no runs of inputs; CheckpointError where they are no groups of `each` at all."""
    import torch

    runs = torch.arange(found.shape[0], device="cpu") // each
    if torch.equal(found.long(), runs):
        return False
    if not torch.equal(found.long().sort().values, runs):
        refuse(where, names[GROUP_OF_INPUT], "no such order", f"{groups} groups of {each} inputs each")
    return True


def _zeros(module: Int4Module, words: torch.Tensor, where: str) -> torch.Tensor:
    """u8 [out, groups of the file]."""
    name, scheme = module.parts[ZEROS], module.scheme
    if scheme.method == "compressed-tensors":
        stored = nibbles(words.t(), IN_ORDER).t()[: module.out_features]
    elif scheme.bits == 8:
        import torch

        stored = words.contiguous().view(torch.uint8).t()[: module.out_features]
    else:
        stored = nibbles(words, AWQ_ORDER if scheme.method == "awq" else IN_ORDER).t()[: module.out_features]
    if scheme.zero_offset is None:
        values, middle = stored.unique().tolist(), _middle(scheme)
        if values not in ([middle - 1], [middle]):
            raise CheckpointError(
                f"{where}: config.json says sym, but {name} holds zero points {values[:8]}, expected all {middle - 1} "
                f"or all {middle}; {AGAIN}"
            )
        return stored * 0 + middle
    largest = (1 << scheme.bits) - 1
    if scheme.zero_offset and bool((stored == largest).any()):
        raise UnsupportedModelError(
            f"{where}: {name} stores a zero point of {largest} in the first version of GPTQ's format, where programs "
            f"disagree whether it is {largest + 1} or 0. {INSTEAD}"
        )
    return stored + scheme.zero_offset


def _middle(scheme: GroupScheme) -> int:
    """The zero point of symmetric codes."""
    return 1 << (scheme.bits - 1)
