"""The messages of earlier chats, for the arrow keys; imported where a person types, for it imports the editor."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from prompt_toolkit.history import FileHistory, History, InMemoryHistory


class KeptHistory(FileHistory):
    """A history that its file keeps as far as it can: neither a full disk nor a file that cannot be read costs a chat
    more than that."""

    def load_history_strings(self) -> Iterable[str]:
        """What the file holds, the newest first; nothing where it cannot be read."""
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        """Add a message to the file, where that takes it."""
        with suppress(OSError):
            super().store_string(string)


def history_file() -> Path | None:
    """Where messages are kept between chats; None where there is no home to keep them in."""
    try:
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        folder = state / "hetero_attn"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = folder / "chat_history"
        file.touch(mode=0o600)
        return file
    except (OSError, RuntimeError):
        return None


def open_history() -> History:
    """The history of earlier chats and this one; of this one alone where nothing can be kept."""
    file = history_file()
    return InMemoryHistory() if file is None else KeptHistory(str(file))
