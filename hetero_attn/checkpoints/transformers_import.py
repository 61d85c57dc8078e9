"""The one place where transformers is imported, which is slow and not safe in two threads at once."""

import importlib
import threading
from typing import Any

_IMPORTING = threading.Lock()


def transformers_part(name: str) -> Any:
    """A public name of transformers.

    Its package puts another object in its own place while it is imported, and a second thread that waits for that
    import gets the first one, which has no such names. So threads come one after another.
    """
    with _IMPORTING:
        return getattr(importlib.import_module("transformers"), name)
