"""How the scripts of this folder end: what they found, in a file that goes on from where it was, and as a last line."""

import json
from pathlib import Path
from typing import Any


def keep(result: dict[str, Any], file: Path | None) -> None:
    """Write it to the file of --json, where one was given."""
    if file:
        file.write_text(json.dumps(result, indent=2) + "\n")


def ended(result: dict[str, Any], file: Path | None) -> int:
    """Keep it, and print it as one line; the exit code."""
    keep(result, file)
    print(json.dumps(result))
    return 0
