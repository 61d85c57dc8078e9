"""jinja2's sandbox for chat templates, with a bound on what one rendering builds: a template is a stranger's program.

Whatever an operation, a filter, a method or a part of the output makes is charged with its length, and what says how
often something is repeated (a product, a width, a replacement) is refused before it is made where the rest of the
budget does not hold it. How long a template runs is bounded by hetero_attn.checkpoints.template_time.
"""

import re
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any

from jinja2.compiler import CodeGenerator, Frame
from jinja2.nodes import Concat
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hetero_attn.errors import PromptError

MOST_CHARACTERS = 1 << 27  # of everything built in one rendering; a conversation of a megabyte takes a few of it
ITEM_CHARACTERS = 8  # what an item of a list counts beside its text
PLAIN = {int, float, bool, type(None)}  # types that hold nothing, and count as an item once more
MOST_BITS = 1 << 16  # of a whole number that a product or a power makes
REPEATING = {"center", "indent", "wordwrap", "batch", "slice", "xmlattr", "format", "sum", "tojson", "round"}
# Filters that make no text of what is in a list, so that its items need not be counted.
SHALLOW = {
    "attr", "count", "d", "default", "dictsort", "first", "groupby", "items", "last", "length", "list", "map", "max",
    "min", "random", "reject", "rejectattr", "reverse", "select", "selectattr", "sort", "unique",
}  # fmt: skip
WIDE = re.compile(r"\d{6}|\*")  # a width of at least 100,000 in a format, or one that an argument gives


class _Generator(CodeGenerator):
    """Code in which `~` asks the environment."""

    def visit_Concat(self, node: Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """An environment whose templates raise PromptError where they build more than MOST_CHARACTERS. `begin` is called
    before each rendering."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=self._shown, **options)
        self._of_thread = threading.local()
        for name, function in dict(self.filters).items():
            self.add_filter(name, function)
        del self.globals["lipsum"]

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """A filter beside those of jinja2, or in the place of one."""
        self.filters[name] = self._charged(name, function)

    def begin(self) -> None:
        """Give this thread's next rendering the whole budget."""
        self._of_thread.left = MOST_CHARACTERS

    def expect(self, size: int) -> None:
        """Raise PromptError where the budget does not hold so much more."""
        if size > getattr(self._of_thread, "left", MOST_CHARACTERS):
            raise PromptError(
                f"the chat template builds more than {MOST_CHARACTERS} characters; the file is damaged or hostile, or "
                "the conversation far beyond any context"
            )

    def charge(self, size: int) -> None:
        """Take from the budget."""
        self.expect(size)
        self._of_thread.left = getattr(self._of_thread, "left", MOST_CHARACTERS) - size

    def made(self, value: Any) -> Any:
        """A value that an operation made, charged."""
        self.charge(size_of(value, MOST_CHARACTERS))
        return value

    def joined(self, parts: Iterable[Any]) -> str:
        """The parts of a `~` as one text."""
        parts = tuple(parts)
        self.charge(size_of(parts, MOST_CHARACTERS))
        return "".join(map(str, parts))

    def concat(self, pieces: Iterable[str]) -> str:  # type: ignore[override]
        """The pieces of an output, of a macro or of a block as one text."""
        collected = []
        for piece in pieces:
            self.charge(len(piece) + 1)
            collected.append(piece)
        return "".join(collected)

    def _shown(self, value: Any) -> Any:
        if not isinstance(value, str):
            self.expect(size_of(value, MOST_CHARACTERS))
        return value

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """A product, power, sum or format, refused where it would be too large."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            self.expect(MOST_CHARACTERS + 1 if bits > MOST_BITS else 0)
            return super().call_binop(context, operator, left, right)
        if operator == "*":
            repeated, times = (right, left) if isinstance(left, int) else (left, right)
            self.expect(size_of(repeated, MOST_CHARACTERS) * times if isinstance(times, int) else 0)
        elif operator == "%" and isinstance(left, str | bytes):
            self._expect_format(left, (right,))
        return self.made(super().call_binop(context, operator, left, right))

    def getitem(self, obj: Any, argument: Any) -> Any:
        """An item or a slice, which is a copy."""
        found = super().getitem(obj, argument)
        return self.made(found) if isinstance(argument, slice) else found

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A function or method; what a method of text makes is foreseen where it may be longer than its text."""
        method = getattr(__obj, "__wrapped__", __obj)
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str | bytes):
            args = __self._expect_method(owner, name, args, kwargs)
        elif isinstance(owner, int) and name == "to_bytes":
            __self.expect(_widest(args, kwargs))
        result = super().call(__context, __obj, *args, **kwargs)
        return __self.made(result) if isinstance(result, str | bytes | list) else result

    def _expect_method(self, text: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        if name == "join" and args:
            items = self._listed(args[0])
            self.expect(size_of(items, MOST_CHARACTERS) + len(text) * len(items))
            return (items, *args[1:])
        if name == "replace" and len(args) > 1:
            self._expect_replacement(text, *args[:2])
        elif name in ("format", "format_map"):
            self._expect_format(text, (*args, *kwargs.values()))
        elif name in ("ljust", "rjust", "center", "zfill"):
            self.expect(len(text) + _widest(args, kwargs))
        elif name in ("expandtabs", "translate"):
            self.expect(len(text) * _widest(args, kwargs))
        return args

    def _expect_format(self, text: Any, values: tuple[Any, ...]) -> None:
        is_wide = WIDE.search(text if isinstance(text, str) else text.decode("latin-1"))
        self.expect(MOST_CHARACTERS + 1 if is_wide else len(text) * _widest(values, {}))

    def _expect_replacement(self, text: Any, old: Any, new: Any) -> None:
        text, old, new = (each if isinstance(each, str | bytes) else str(each) for each in (text, old, new))
        self.expect(len(text) + (text.count(old) if type(text) is type(old) else 0) * len(new))

    def _listed(self, items: Any) -> list[Any]:
        """What is to be joined, which may be a generator."""
        found: list[Any] = []
        for item in items:
            self.charge(ITEM_CHARACTERS)
            found.append(item)
        return found

    def _charged(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose result is foreseen and charged."""
        first = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context, or what else it asks for

        @wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            if len(args) > first:
                before, value, rest = args[:first], args[first], args[first + 1 :]
                args = (*before, self._expect_filter(name, value, rest, kwargs), *rest)
            result = function(*args, **kwargs)
            return self.made(result) if isinstance(result, str) else result

        return charged

    def _expect_filter(self, name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The value of a filter, as a list where it is to be joined."""
        if name in SHALLOW:
            return value
        value = self._listed(value) if name == "join" and not isinstance(value, str) else value
        size = size_of(value, MOST_CHARACTERS)
        if name == "replace" and len(args) > 1:
            self.expect(size)
            self._expect_replacement(value, *args[:2])
        elif name == "join":
            self.expect(size + len(value) * _widest(args, kwargs))
        elif name == "format" and isinstance(value, str):
            self._expect_format(value, (*args, *kwargs.values()))
        else:
            self.expect(max(1, size) * (_widest(args, kwargs) if name in REPEATING else 1))
        return value


def _widest(args: Iterable[Any], kwargs: Mapping[str, Any]) -> int:
    """The largest number or the greatest size among arguments, at least 1."""
    values = (*args, *kwargs.values())
    return max((abs(v) if isinstance(v, int) else size_of(v, MOST_CHARACTERS) for v in values), default=1) or 1


def size_of(value: Any, most: int) -> int:
    """About as many characters as a value has as text, everything in it included; counted no further than `most`."""
    size, open_ = 0, [value]
    while open_ and size <= most:
        each = open_.pop()
        if isinstance(each, str | bytes):
            size += len(each)
        elif isinstance(each, Mapping):
            size += ITEM_CHARACTERS * len(each)
            open_ += [*each.keys(), *each.values()]
        elif isinstance(each, list | tuple | set | frozenset):
            looked_at = [item for item in each if type(item) not in PLAIN]
            size += ITEM_CHARACTERS * (2 * len(each) - len(looked_at))
            open_ += looked_at
        else:
            size += ITEM_CHARACTERS
    return size
