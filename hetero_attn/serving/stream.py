"""The pieces of one request's text, for one reader or several, however the steps came about that made them."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

from hetero_attn.errors import BusyError
from hetero_attn.serving.progress import PrefillBar
from hetero_attn.serving.request import Piece, Progress, Request, RequestOutput
from hetero_attn.serving.scheduling.turns import Turns


class Stream(Iterator[Piece]):
    """Yields what a request has that was not yielded before, and takes steps while there is nothing.

    The request is queued by the first `next`. Whoever else takes steps meanwhile makes later pieces longer and changes
    nothing else: each character and token comes in exactly one piece. A stream that is dropped ends its request with
    the next step. step: takes one step for every request.
    """

    def __init__(self, turns: Turns, request: Request, step: Callable[[], object], bar: PrefillBar) -> None:
        self._turns = turns
        self._request = request
        self._step = step
        self._bar = bar
        self._lock = threading.RLock()  # held for a few loads and stores, never while something is waited for
        self._is_queued = False
        self._shown = Progress()

    def __next__(self) -> Piece:
        try:
            while (piece := self._take()) is None:
                self._step()
                self._bar.update()
        except (BusyError, StopIteration):
            raise
        except BaseException:
            self.close()
            raise
        return piece

    def close(self) -> None:
        """End the request; what has come stays readable, and no more pieces come."""
        self._shown = self._shown._replace(finish_reason="abort")
        self._bar.close()
        self._turns.abort(self._request)

    def output(self) -> RequestOutput:
        """The generation as far as it has come, whoever read its pieces; raises the error that ended it, if one did.

        finish_reason: "abort" behind `close`, also while the step that takes it up is under way.
        """
        output = self._turns.output_of(self._request)
        is_left = output.finish_reason is None and self._shown.finish_reason is not None
        return replace(output, finish_reason=self._shown.finish_reason) if is_left else output

    def __del__(self) -> None:
        if self._is_queued and self._request.finish_reason is None:
            self._turns.leave(self._request)

    def _take(self) -> Piece | None:
        """What is new, None where nothing is; queues the request the first time."""
        with self._lock:
            if not self._is_queued:
                self._is_queued = True
                self._turns.add(self._request)
            before, now = self._look()
        if before.finish_reason is not None:
            raise StopIteration
        if now is before:
            return None
        text, token_ids = now.text[before.chars :], tuple(self._request.token_ids[before.tokens : now.tokens])
        if now.finish_reason is None:
            return Piece(text, token_ids)
        self._bar.close()
        output = self._turns.output_of(self._request)
        return Piece(text, token_ids, output.finish_reason, output.metrics)

    def _look(self) -> tuple[Progress, Progress]:
        """What was shown before and what is now; the cursor has moved before anybody gets the piece.

        Nothing is called between the reading of the request and the last store, so no signal handler can take the same
        piece in between.
        """
        now, before = self._request.progress, self._shown
        if before.finish_reason is None and (now.chars > before.chars or now.finish_reason is not None):
            self._shown = now
            return before, now
        return before, before
