"""The codes of a coded format as vector registers: planes put together, tables looked up; see formats/base.py."""

from collections.abc import Callable

from llvmlite import ir

from cpu_kernels.formats import LINE_BYTES, WeightFormat
from cpu_kernels.vectors.dot import V16I8, V32I8, in_parts, together
from cpu_kernels.vectors.isa import Isa
from cpu_kernels.vectors.vector import I8, I32, VI32, call_llvm, constant, load_as

NIBBLES = 0x0F0F0F0F
V64I8 = ir.VectorType(I8, 64)


def look_up(isa: Isa, b, table: tuple[int, ...], indexes):
    """The bytes of a table of 16, by 64 indexes below 16 in an <16 x i32>."""
    if isa.has_avx512:
        entries = ir.Constant(V64I8, list(table) * 4)
        found = call_llvm(b, "llvm.x86.avx512.pshuf.b.512", V64I8, entries, b.bitcast(indexes, V64I8))
        return b.bitcast(found, VI32)
    if isa.has_avx2 or isa.name == "neon":
        part = V16I8 if isa.name == "neon" else V32I8
        entries = ir.Constant(part, [*table] * (part.count // 16))
        name = "llvm.aarch64.neon.tbl1.v16i8" if isa.name == "neon" else "llvm.x86.avx2.pshuf.b"
        found = [call_llvm(b, name, part, entries, piece) for piece in in_parts(b, indexes, part)]
        return together(b, [b.bitcast(piece, ir.VectorType(I32, part.count // 4)) for piece in found])
    indexes, found = b.bitcast(indexes, V64I8), constant(V64I8, table[0])
    for index, entry in enumerate(table[1:], 1):
        found = b.select(b.icmp_unsigned("==", indexes, constant(V64I8, index)), constant(V64I8, entry), found)
    return b.bitcast(found, VI32)


def half_words(item: WeightFormat, b, lines) -> Callable[[int, int], object]:
    """word(k, half): as `code_words`, of half the features, <8 x i32>; of planes of nibbles and of bytes."""
    half_bytes, eight = LINE_BYTES // 2, ir.VectorType(I32, 8)

    def word(k: int, half: int):
        if item.plane == "f8":
            return load_as(b, lines, eight, LINE_BYTES * k + half_bytes * half)
        both = load_as(b, lines, eight, LINE_BYTES * (k // 2) + half_bytes * half)
        return b.and_(b.lshr(both, constant(eight, 4)) if k % 2 else both, constant(eight, NIBBLES))

    return word


def code_words(isa: Isa, item: WeightFormat, b, lines, table: tuple[int, ...]) -> Callable[[int], object]:
    """word(k): the codes of inputs 4k..4k+3 of all features, unsigned bytes, or of a t4 plane entries of `table`;
    `lines` is the address of the code lines."""
    loaded: dict[tuple[object, int], object] = {}

    def line(index: int):
        place = b.block, index  # what one branch has loaded another has not
        if place not in loaded:
            loaded[place] = load_as(b, lines, VI32, LINE_BYTES * index)
        return loaded[place]

    def shifted(value, left: int):
        if left == 0:
            return value
        return b.shl(value, constant(VI32, left)) if left > 0 else b.lshr(value, constant(VI32, -left))

    def nibble(k: int):
        return b.and_(shifted(line(k // 2), -4 * (k % 2)), constant(VI32, NIBBLES))

    def word(k: int):
        if item.plane in ("i8", "f8", "b4", "b5", "b6", "bt"):
            return line(k)
        if item.plane == "t4":
            return look_up(isa, b, table, nibble(k))
        if item.plane == "u5":
            upper, mask = shifted(line(8 + k // 8), 4 - k % 8), 0x10101010
        elif item.plane == "u6":
            upper, mask = shifted(line(8 + k // 4), 4 - 2 * (k % 4)), 0x30303030
        else:
            return nibble(k)
        return b.or_(nibble(k), b.and_(upper, constant(VI32, mask)))

    return word
