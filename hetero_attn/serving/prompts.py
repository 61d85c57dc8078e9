"""What users give as prompts and messages, made plain: text, tuples of int, messages whose content is text.

Token ids may be Python's or numpy's integers, arrays or tensors of any integer type. Everything else is a PromptError
that says what was found.
"""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from hetero_attn.errors import PromptError

TokenIds = tuple[int, ...]
EXPECTED = "give text or a list of token ids, or a list of those"
MOST_PROMPTS = 1 << 20
# What `apply_chat_template` takes itself; as template variables they would change what it returns.
RESERVED = {
    "conversation",
    "messages",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
}


def as_prompts(prompts: Any) -> list[str | TokenIds]:
    """One prompt or several as a list. Raises PromptError."""
    if isinstance(prompts, str):
        return [prompts]
    items = _items(prompts)
    if items and all(_is_token_id(item) for item in items):
        return [tuple(int(item) for item in items)]
    return [as_prompt(item) for item in items]


def as_prompt(prompt: Any) -> str | TokenIds:
    """One prompt: text as it is, token ids as a tuple of int. Raises PromptError."""
    return prompt if isinstance(prompt, str) else as_token_ids(prompt)


def as_token_ids(token_ids: Any) -> TokenIds:
    """Token ids as a tuple of int, their range not yet checked. Raises PromptError."""
    items = _items(token_ids)
    for position, item in enumerate(items):
        if not _is_token_id(item):
            raise PromptError(f"position {position} of the prompt holds {item!r:.60}, which is no token id; {EXPECTED}")
    return tuple(int(item) for item in items)


def _items(value: Any) -> list:
    """The items of a list, or of an array or tensor as plain integers."""
    if hasattr(value, "tolist") and hasattr(value, "ndim"):
        if value.ndim not in (1, 2):
            raise PromptError(f"the prompt is an array of {value.ndim} dimensions, 1 or 2 are expected; {EXPECTED}")
        try:
            value = value.tolist()
        except RuntimeError as error:  # torch's meta and sparse tensors have no list
            raise PromptError(f"the prompt is a tensor without plain values ({error}); {EXPECTED}") from None
    if isinstance(value, (bytes, Mapping)) or not isinstance(value, Sequence):
        raise PromptError(f"the prompt is {value!r:.60} of type {type(value).__name__}; {EXPECTED}")
    return list(value)


def _is_token_id(item: Any) -> bool:
    return isinstance(item, Integral) and not isinstance(item, bool)


def as_messages(messages: Any) -> list[dict[str, Any]]:
    """Chat messages whose content is text: parts of text are joined, anything else in its place is refused.

    A message without content may carry "tool_calls". Raises PromptError.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise PromptError("chat messages must be a non-empty list of {'role': ..., 'content': ...}")
    return [_message(position, message) for position, message in enumerate(messages)]


def are_conversations(messages: Any) -> bool:
    """Whether these are several conversations, each a list of messages, and not the messages of one."""
    return (
        isinstance(messages, (list, tuple)) and bool(messages) and all(isinstance(m, (list, tuple)) for m in messages)
    )


def _message(position: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise PromptError(
            f"message {position} is {message!r:.60}; chat messages must be {{'role': ..., 'content': ...}}"
        )
    content = message.get("content")
    if content is None and isinstance(calls := message.get("tool_calls"), (list, tuple)) and calls:
        return dict(message)
    return {**message, "content": _text(position, content)}


def _text(position: int, content: Any) -> str:
    if isinstance(content, str):
        return _as_unicode(position, content)
    parts = content if isinstance(content, (list, tuple)) else ()
    if parts and all(
        isinstance(p, Mapping) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts
    ):
        return _as_unicode(position, "".join(part["text"] for part in parts))
    raise PromptError(
        f"the content of message {position} is {content!r:.60}; it must be text or a list of "
        f"{{'type': 'text', 'text': ...}}, "
        "beside the role"
    )


def _as_unicode(position: int, text: str) -> str:
    """The text, which half a surrogate pair would make unusable; such halves stand for bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the content of message {position} is not valid Unicode at character {error.start} "
            f"({text[error.start]!a}); give text without surrogates"
        ) from None
    return text


def as_template_variables(variables: Any) -> dict[str, Any]:
    """Variables for a chat template by name, such as enable_thinking or tools; None is none. Raises PromptError."""
    if variables is None:
        return {}
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise PromptError(f"template_variables is {variables!r:.60}; it must be a mapping of names to values")
    if taken := sorted(RESERVED & set(variables)):
        raise PromptError(f"template_variables names {', '.join(taken)}, which cannot be set; leave it out")
    return dict(variables)
