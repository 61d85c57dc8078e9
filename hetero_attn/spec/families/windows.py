"""Which layers see a sliding window, and how wide, in the ways that the families say it."""

from collections.abc import Callable
from typing import Any

from hetero_attn.errors import ConfigError, UnsupportedModelError
from hetero_attn.spec.json_fields import JsonFields, show
from hetero_attn.spec.limits import MAX_CONTEXT

FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW_KEYS = (".attention.sliding_window", ".attention.sliding_window_pattern")  # of GGUF files
Windows = Callable[[JsonFields, int], tuple[int, ...]]


def no_windows(fields: JsonFields, num_layers: int) -> tuple[int, ...]:
    """Every token sees all before it, whatever the config says of windows."""
    return (0,) * num_layers


def one_window(fields: JsonFields, num_layers: int) -> tuple[int, ...]:
    """The same window in every layer."""
    return (fields.integer("sliding_window", MAX_CONTEXT, 0),) * num_layers


def windows_from(first_key: str) -> Windows:
    """Windows of the layers that layer_types names, else of those from the layer `first_key` on, where they are
    used."""

    def windows(fields: JsonFields, num_layers: int) -> tuple[int, ...]:
        window = fields.integer("sliding_window", MAX_CONTEXT, 0)
        if not fields.boolean("use_sliding_window"):
            window = 0
        if fields.get("layer_types") is not None:
            return windows_of_types(fields, fields.get("layer_types"), window, num_layers)
        first = fields.integer(first_key, MAX_CONTEXT, 28, low=0)
        return tuple(window if layer >= first else 0 for layer in range(num_layers))

    return windows


def windows_every(period_key: str) -> Windows:
    """Windows of the layers that layer_types names, else of all but every `period_key`-th."""

    def windows(fields: JsonFields, num_layers: int) -> tuple[int, ...]:
        window = fields.integer("sliding_window", MAX_CONTEXT, 0)
        period = fields.integer(period_key, MAX_CONTEXT)
        types = fields.get("layer_types")
        if types is None:
            types = [SLIDING if (layer + 1) % period else FULL for layer in range(num_layers)]
        return windows_of_types(fields, types, window, num_layers)

    return windows


def gguf_windows(fields: Any, num_layers: int, period: int, absent: int | None = 0) -> tuple[int, ...]:
    """The window of every layer of a GGUF file that has one: of those that its pattern names, or of all but every
    so many; period: where it says nothing of that. absent: the window where the file names none, None where it must."""
    size, pattern = WINDOW_KEYS
    if absent is None:
        window = fields.integer(size, MAX_CONTEXT)
    else:
        window = fields.integer(size, MAX_CONTEXT, absent, low=0)
    if fields.is_list(pattern):
        return tuple(window if slides else 0 for slides in fields.numbers(pattern, num_layers))
    period = fields.integer(pattern, MAX_CONTEXT, period)
    return tuple(window if (layer + 1) % period else 0 for layer in range(num_layers))


def gguf_one_window(fields: Any, num_layers: int) -> tuple[int, ...]:
    """The window of every layer of a GGUF file whose layers all have the same, 0 where it names none."""
    return (fields.integer(WINDOW_KEYS[0], MAX_CONTEXT, 0, low=0),) * num_layers


def windows_of_types(fields: JsonFields, layer_types: Any, window: int, num_layers: int) -> tuple[int, ...]:
    """The window of every layer by the name of its kind; raises for other kinds, or windows of no size."""
    known = (FULL, SLIDING)
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        fields.fail("layer_types", layer_types, f"a list of num_hidden_layers = {num_layers} names")
    for name in layer_types:
        if name not in known:
            raise UnsupportedModelError(
                f"{fields.path}: layer type {show(name)} is not supported. Known layer types: {', '.join(known)}"
            )
    if SLIDING in layer_types and not window:
        raise ConfigError(
            f"{fields.path}: layer_types has sliding_attention, but sliding_window is null or use_sliding_window "
            "false; set both or use full_attention"
        )
    return tuple(window if name == SLIDING else 0 for name in layer_types)
