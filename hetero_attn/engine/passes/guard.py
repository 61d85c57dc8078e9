"""What a step that fails leaves behind: nothing; and, where its lanes are stuck, no step after it."""

from types import TracebackType

from hetero_attn.errors import EngineDeadError
from hetero_attn.lanes.lanes import Lanes


class Guard:
    """Stands around the work of a step. fault: why no step can be computed any more, None while it can.

    No generator: every step enters one, and after a pass over all weights each call of Python's costs a microsecond.
    """

    def __init__(self, lanes: Lanes) -> None:
        self.fault: str | None = None
        self._lanes = lanes

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            return
        try:
            self._lanes.reset()
        except EngineDeadError as stuck:
            self._note(stuck)
            raise
        if isinstance(error, EngineDeadError):
            self._note(error)

    def _note(self, error: EngineDeadError) -> None:
        self.fault = f"{type(error).__name__}: {error}"
