"""Is too much waiting in the buffer? High and low water marks, on bytes and age, of each partition and in total.

Not here: counting (the scripts of `buffer/`) and what a put does about it (`puts.py`). The *pressure* is how full the
fullest of these is, as a share of its mark: from 1 on puts slow down, from `THROUGH` on each waits until Postgres has
it, and it ends below `LOW`. While Postgres is away there is nowhere else to go, and nothing is slowed down.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from checkpointer.events import CheckpointEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from checkpointer.options import BufferOptions

LOW = 0.8
THROUGH = 1.5
_LONGEST_PAUSE = 0.25
_PARTITION_SHARE = 4


class WaterMarks:
    """The pressure in one saver's buffer, from what the scripts' replies and the flusher's scans tell.

    Args:
        options: Has the marks.
        emit: Takes the events `buffer.high` and `buffer.normal`.
    """

    def __init__(self, options: BufferOptions, emit: Callable[[CheckpointEvent], None]) -> None:
        self._options = options
        self._emit = emit
        self._lock = threading.Lock()
        self._bytes: dict[int, int] = {}
        self._ages: dict[int, float] = {}
        self._total = 0
        self._is_high = False
        # Most puts only have to look at this.
        self.pressure = 0.0

    def renew_lock(self) -> None:
        """In a forked child: whoever held the lock is not here."""
        self._lock = threading.Lock()

    def note(self, partition: int, held_bytes: int, age: float) -> None:
        """Note what a partition holds and for how many seconds its oldest record has waited."""
        with self._lock:
            self._total += held_bytes - self._bytes.get(partition, 0)
            self._bytes[partition] = held_bytes
            self._ages[partition] = age
            mark = self._options.high_water_bytes
            pressure = max(self._total / mark, held_bytes * _PARTITION_SHARE / mark, age / self._options.high_water_age)
            if pressure >= self.pressure:
                self._set(pressure)

    def scanned(self, found: Mapping[int, tuple[int, float]]) -> None:
        """Note bytes and age of every partition at once; what is not named holds nothing."""
        with self._lock:
            self._bytes = {partition: held for partition, (held, _) in found.items()}
            self._ages = {partition: age for partition, (_, age) in found.items()}
            self._total = sum(self._bytes.values())
            mark = self._options.high_water_bytes
            fullest = max(self._bytes.values(), default=0) * _PARTITION_SHARE
            oldest = max(self._ages.values(), default=0.0)
            self._set(max(self._total / mark, fullest / mark, oldest / self._options.high_water_age))

    def _set(self, pressure: float) -> None:
        self.pressure = pressure
        if pressure >= 1 and not self._is_high:
            self._is_high = True
            self._tell("buffer.high", "warning", "The buffer fills faster than it is flushed; puts slow down.")
        elif pressure < LOW and self._is_high:
            self._is_high = False
            self._tell("buffer.normal", "info", "The buffer is below its low-water mark again.")

    def _tell(self, name: str, severity: str, message: str) -> None:
        self._emit(
            CheckpointEvent(
                name=name,
                error_type="checkpoint_buffer_error" if severity == "warning" else None,
                severity="warning" if severity == "warning" else "info",
                message=message,
                component="buffer",
                outcome="buffered" if severity == "warning" else "recovered",
                context={
                    "bytes": self._total,
                    "high_water_bytes": self._options.high_water_bytes,
                    "oldest_seconds": round(max(self._ages.values(), default=0.0), 3),
                    "high_water_age": self._options.high_water_age,
                },
            )
        )

    @property
    def is_high(self) -> bool:
        """Whether puts are to be slowed down: from the high mark on, down to the low one."""
        return self._is_high

    def pause(self) -> float:
        """Return for how many seconds a put has to wait now."""
        if not self._is_high:
            return 0.0
        return _LONGEST_PAUSE * min(1.0, max(0.05, (self.pressure - LOW) / (THROUGH - LOW)))

    def goes_through(self) -> bool:
        """Tell whether a put has to wait until Postgres has it."""
        return self._is_high and self.pressure >= THROUGH
