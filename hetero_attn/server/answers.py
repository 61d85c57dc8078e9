"""JSON answers: they may repeat what a body holds, so no text of a client's can fail them."""

import json
from typing import Any

from starlette.responses import JSONResponse


class JsonAnswer(JSONResponse):
    """A JSON answer. As in streams, what is no Unicode in the text that it repeats is replaced."""

    def render(self, content: Any) -> bytes:
        """The answer's body as UTF-8."""
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
