"""Is this an object file that the loader can take? Everything that it will follow is looked at first.

LLVM's loader trusts its input: an offset beyond the end, an unknown relocation or a symbol that nobody defines ends the
process. Checked here is the form of an ELF64 relocatable object for this machine: every section lies in the file, every
name ends in its table, every symbol and relocation points into a section that is there, the kernel is defined in code,
and all that it calls exists (System V ABI, "Object Files").
"""

import struct
from collections.abc import Callable
from typing import NamedTuple

HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
SECTION = struct.Struct("<IIQQQQIIQQ")
SYMBOL = struct.Struct("<IBBHQQ")
RELOCATION = struct.Struct("<QQq")
IDENTITY = b"\x7fELF\x02\x01\x01"  # 64 bits, little endian, version 1
RELOCATABLE = 1
MACHINES = {"x86_64": 62, "AMD64": 62, "aarch64": 183, "arm64": 183}
NOTHING, BITS, SYMBOLS, STRINGS, RELOCATIONS, NOTE, NO_BITS, UNWIND = 0, 1, 2, 3, 4, 7, 8, 0x70000001
KINDS = {NOTHING, BITS, SYMBOLS, STRINGS, RELOCATIONS, NOTE, NO_BITS, UNWIND}  # all that our compiler emits
# Relocation type -> bytes that it writes, for machines where an unknown one ends the process.
WIDTHS = {"x86_64": {0: 0, 1: 8, 2: 4, 4: 4, 9: 4, 10: 4, 11: 4, 24: 8, 25: 8, 26: 4, 41: 4, 42: 4}}
MOST_ALIGNMENT = 1 << 21
MOST_SECTION_BYTES = 1 << 26
ALLOCATED, EXECUTABLE = 2, 4
UNWIND_NAME = ".eh_frame"  # the loader hands what has this name to the unwinder, whatever its kind
# Write, allocate, execute, merge, strings, info is a link, far away: no thread-local memory, nothing compressed.
FLAGS = 0x10000077
GLOBAL, FUNCTION, FILE = 1, 2, 4
BINDINGS, TYPES = {0, 1, 2}, {0, 1, 2, 3, 4}  # local, global, weak; none, object, function, section, file
# Places of symbols that are in no section: fixed numbers, and memory that the loader is to make, `value` its alignment.
ABSOLUTE, COMMON = 0xFFF1, 0xFFF2
COMMON_ALIGNMENTS = {1, 2, 4, 8, 16, 32, 64}
MOST_SECTIONS = 1 << 12


class Section(NamedTuple):
    """One entry of the section table."""

    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry_size: int


class Symbol(NamedTuple):
    """One entry of the symbol table."""

    name: str
    info: int
    section: int
    value: int

    @property
    def is_defined(self) -> bool:
        """Whether the object itself holds what the symbol names."""
        return self.section != 0


class ObjectError(ValueError):
    """What is wrong with an object file."""


def check_object(code: bytes, kernel: str, machine: str, exists: Callable[[str], bool]) -> None:
    """Raise ObjectError unless `code` is a sound object that defines the function `kernel` and calls only what exists.

    machine: as `platform.machine()` names it. exists(name): whether this process has a symbol.
    """
    try:
        sections = _sections(code, machine)
        symbols = _symbols(code, sections)
        for section in sections:
            if section.kind == RELOCATIONS:
                _check_relocations(code, section, sections, symbols, WIDTHS.get(machine))
    except (struct.error, UnicodeDecodeError, IndexError):
        raise ObjectError("it ends too early or its tables are damaged") from None
    _check_symbols(symbols, sections, kernel, exists)


def _sections(code: bytes, machine: str) -> list[Section]:
    identity, kind, found, _, _, _, table, _, _, _, _, size, count, names = HEADER.unpack_from(code)
    _expect(identity.startswith(IDENTITY) and kind == RELOCATABLE, "it is no relocatable ELF64 object")
    _expect(found == MACHINES.get(machine, found), f"it is for another machine than {machine}")
    sound = size == SECTION.size and 0 < count < MOST_SECTIONS and table + count * size <= len(code)
    _expect(sound, "its section table has an impossible size")
    sections = [Section(*SECTION.unpack_from(code, table + index * size)) for index in range(count)]
    for section in sections:
        stop = section.offset + (0 if section.kind == NO_BITS else section.size)
        _expect(stop <= len(code), "a section lies outside of it")
        known = section.kind in KINDS and not section.flags & ~FLAGS and section.link < count
        _expect(known, "a section is of an unknown kind")
        sizes = section.size <= MOST_SECTION_BYTES and section.alignment <= MOST_ALIGNMENT
        _expect(sizes and not section.alignment & (section.alignment - 1), "a section has an impossible size")
    _expect(names < count and sections[names].kind == STRINGS, "its sections have no names")
    for section in sections:
        is_unwind = _text(code, sections[names], section.name) == UNWIND_NAME
        _expect(not is_unwind or _is_loaded(section), "its unwind table is of a wrong kind")
    return sections


def _is_loaded(section: Section) -> bool:
    """Whether the section's bytes of the file get a place in memory."""
    return section.kind in (BITS, UNWIND) and bool(section.flags & ALLOCATED)


def _is_table(section: Section, entry: struct.Struct) -> bool:
    """Whether a section is a row of whole entries."""
    return section.entry_size == entry.size and section.size % entry.size == 0


def _symbols(code: bytes, sections: list[Section]) -> list[Symbol]:
    tables = [section for section in sections if section.kind == SYMBOLS]
    _expect(len(tables) == 1, f"it has {len(tables)} symbol tables")
    (table,) = tables
    names = sections[table.link]
    _expect(names.kind == STRINGS and _is_table(table, SYMBOL), "its symbol table is damaged")
    found = []
    for at in range(table.offset, table.offset + table.size, SYMBOL.size):
        name, info, _, section, value, size = SYMBOL.unpack_from(code, at)
        _expect(info >> 4 in BINDINGS and info & 15 in TYPES, "a symbol is of an unknown kind")
        if section == COMMON:
            sound = value in COMMON_ALIGNMENTS and size <= MOST_SECTION_BYTES
        else:
            sound = section in (0, ABSOLUTE) or (section < len(sections) and value <= sections[section].size)
        _expect(sound, "a symbol lies outside of its section")
        found.append(Symbol(_text(code, names, name), info, section, value))
    return found


def _text(code: bytes, table: Section, name: int) -> str:
    """The text that begins `name` bytes into a table of names."""
    end = code.find(b"\0", table.offset + name, table.offset + table.size)
    _expect(end >= 0, "a name is not in the table of names")
    return code[table.offset + name : end].decode()


def _check_relocations(
    code: bytes, table: Section, sections: list[Section], symbols: list[Symbol], widths: dict[int, int] | None
) -> None:
    sound = table.info < len(sections) and sections[table.link].kind == SYMBOLS and _is_table(table, RELOCATION)
    _expect(sound, "a relocation table is damaged")
    target = sections[table.info]
    _expect(_is_loaded(target), "a relocation table is for a section that is not loaded")
    for at in range(table.offset, table.offset + table.size, RELOCATION.size):
        offset, info, _ = RELOCATION.unpack_from(code, at)
        kind = info & 0xFFFFFFFF
        _expect(widths is None or kind in widths, f"relocations of type {kind} are unknown")
        width = 8 if widths is None else widths[kind]
        _expect(offset + width <= target.size and info >> 32 < len(symbols), "a relocation points nowhere")
        _expect(symbols[info >> 32].info & 15 != FILE, "a relocation is to a file's name")


def _check_symbols(symbols: list[Symbol], sections: list[Section], kernel: str, exists: Callable[[str], bool]) -> None:
    for symbol in symbols:
        _expect(
            symbol.is_defined or not symbol.name or exists(symbol.name), f"it calls {symbol.name}, which is nowhere"
        )
    entries = [symbol for symbol in symbols if symbol.name == kernel and symbol.is_defined]
    sound = len(entries) == 1 and entries[0].info == GLOBAL << 4 | FUNCTION and entries[0].section < len(sections)
    _expect(sound, f"it does not define the kernel {kernel}")
    home = sections[entries[0].section]
    _expect(bool(home.flags & EXECUTABLE) and entries[0].value < home.size, f"{kernel} is not in its code")


def _expect(is_so: bool, problem: str) -> None:
    if not is_so:
        raise ObjectError(problem)
