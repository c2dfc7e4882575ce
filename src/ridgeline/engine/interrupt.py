"""Ctrl-C waits for the end of a step.

Python raises KeyboardInterrupt between any two bytecodes: in the middle of a scheduler's bookkeeping it
would leave an engine that nobody can trust. Knows signals. It must not know engines.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Uninterrupted:
    """A `with` block whose Ctrl-C comes at its end, as the usual KeyboardInterrupt.

    A second Ctrl-C comes at once: a block that hangs can be left. Only Python's own handler is stood in
    for, in the main thread (signals reach no other); entering and leaving takes a few microseconds.
    """

    def __enter__(self) -> None:
        self._asked = False
        self._stands_in = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if self._stands_in:
            signal.signal(signal.SIGINT, self._note)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stands_in:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._asked and error is None:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
