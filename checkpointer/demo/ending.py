"""When the demo is asked to end: by Ctrl-C, by SIGTERM, or by a terminal that goes away.

A signal only leaves a mark, which everything that waits looks at. So nothing is cut off in the middle of starting or of
cleaning up, and a second signal changes nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["EndedError", "Ending"]

_TURN = 0.05
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SAID = b"\nThe demo ends; a moment, please.\n"


class EndedError(Exception):
    """The demo was asked to end."""


class Ending:
    """Whether the demo was asked to end; used from any thread.

    Attributes:
        asked: It was.
    """

    def __init__(self) -> None:
        self.asked = False

    def mind_signals(self) -> None:
        """Be asked by signals, from now on until the process ends; call it in the main thread."""

        def ask(*_: object) -> None:
            if not self.asked:
                self.asked = True
                with contextlib.suppress(OSError):
                    # Not by way of a stream: the signal may have come in the middle of a print.
                    os.write(2, _SAID)

        for number in _SIGNALS:
            # What is ignored stays so: SIGHUP under nohup, SIGINT in the background of a script.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, ask)

    def ignore_signals(self) -> None:
        """Let the process come to its end, whatever comes."""
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def check(self) -> None:
        """Go on only if nobody has asked.

        Raises:
            EndedError: Somebody has.
        """
        if self.asked:
            raise EndedError

    def sleep(self, seconds: float) -> None:
        """Sleep, or less if somebody asks; does not raise."""
        deadline = time.monotonic() + seconds
        while not self.asked and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(_TURN, left))

    def wait_for(self, what: str, is_true: Callable[[], object], seconds: float = 60.0) -> None:
        """Wait until something is true.

        Raises:
            EndedError: Somebody has asked for the end.
            TimeoutError: It did not become true in this time.
        """
        deadline = time.monotonic() + seconds
        while True:
            self.check()
            if is_true():
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"This should have happened within {seconds:g} s and has not: {what}.")
            self.sleep(_TURN)
