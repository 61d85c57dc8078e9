"""Messages of the Python API in the words of the command line: `max_context` is `--context` here."""

import re

OPTIONS = {
    "max_context": "--context",
    "max_tokens": "--max-tokens",
    "max_batch": "--batch",
    "num_threads": "--threads",
    "gpu_memory": "--gpu-memory",
    "kv_dtype": "--kv-dtype",
    "dtype=": "--dtype=",  # alone it is a word of many sentences
    "tokenizer=": "--tokenizer=",
    "top_p": "--top-p",
    "top_k": "--top-k",
    "min_p": "--min-p",
    "repetition_penalty": "--repetition-penalty",
}
# Not part of a longer name or path, no key of a file (`top_k:`), no attribute and not already an option.
_NAMES = rf"(?<![\w./-])(?P<name>{'|'.join(OPTIONS)})(?:(?<==)|(?![\w.]|:))"
# A quotation or a call, whose strings may hold anything: what is in them is to be copied as it stands.
_CODE = r"""`[^`]*`|\w\((?:[^()'"]|'[^']*'|"[^"]*")*\)"""
_CODE_OR_NAME = re.compile(f"{_CODE}|{_NAMES}")


def in_option_words(message: str) -> str:
    """The message with names of arguments as the options that set them, its code as it is."""
    return _CODE_OR_NAME.sub(lambda found: OPTIONS[found["name"]] if found["name"] else found[0], message)
