"""The store of errors: each becomes a row of `system_errors`, also one that happens while Postgres is away.

| module | what it knows |
|---|---|
| `fingerprint` | which errors are of one kind |
| `folding` | when a burst becomes one row with a count |
| `ingest` | how rows, groups and counts get into Postgres |
| `recoveries` | which errors are over by themselves |
| `retention` | what is kept how long |

Here they come together. Not here: the ways that a row can take (`observability/outbox.py`), and which events are errors
(`observability/hooks/system_errors.py`).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import threading
import time
from typing import TYPE_CHECKING

from checkpointer.hooks import renew_in_child
from observability.errors.fingerprint import fingerprint_of
from observability.errors.folding import QUOTAS, Folding, Quota
from observability.errors.ingest import SYSTEM_ERRORS
from observability.errors.recoveries import RECOVERIES, recoveries_of, recovery_key
from observability.projections import operator_view
from observability.scrub import safe_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from checkpointer.events import CheckpointEvent
    from observability.outbox import Outbox, Values

__all__ = ["SYSTEM_ERRORS", "SystemErrorStore"]

_CLOSE_SECONDS = 2.0


class SystemErrorStore:
    """Takes errors and sees that each is stored: as a row, or counted in one if there is a burst.

    Safe to use from several threads. A forked child starts with nothing held: what is held at the fork is the parent's.

    Args:
        outbox: Knows `SYSTEM_ERRORS` and `RECOVERIES`.
        prefix: Of the Redis keys: threads of another prefix are others.
        quotas: How many rows this process may store before threads are folded as well.
    """

    def __init__(self, outbox: Outbox, prefix: str = "", *, quotas: tuple[Quota, ...] = QUOTAS) -> None:
        self._outbox = outbox
        self._prefix = prefix
        self._quotas = quotas
        self._closed = False
        self._is_known_at_exit = False
        self._renew()
        renew_in_child(self._renew)

    def _renew(self) -> None:
        self._changed = threading.Condition(threading.RLock())
        # Held while folded rows are stored, so that whoever flushes waits for those that are under way.
        self._turn = threading.RLock()
        self._folding = Folding(self._quotas)
        self._folder: threading.Thread | None = None

    def add(self, event: CheckpointEvent) -> str:
        """Store an event as a row; waits for the server, so not for the saver's own thread.

        Returns:
            The way it took: `direct`, `redis`, `spool` or `stderr`; `folded` if it is held for a second, to be stored
            together with others.
        """
        row = self._row(event)
        with self._changed:
            # At the end nobody is there any more who would store what is held.
            now = row if self._closed else self._folding.offer(row, time.monotonic())
            if now is None:
                self._see_to_folded()
                return "folded"
        return self._outbox.add(SYSTEM_ERRORS, now)

    def add_recoveries(self, event: CheckpointEvent) -> None:
        """Resolve the errors that an event shows to be over; waits for the server."""
        for row in recoveries_of(event, self._prefix, _instance()):
            self._outbox.add(RECOVERIES, row)

    def flush(self) -> None:
        """Store what is held; waits for the server."""
        self._store(lambda: self._folding.rest())

    def collect_leftovers(self) -> None:
        """Start moving what an earlier process could not bring into the table."""
        self._outbox.drain_soon()

    def close(self, timeout: float = 5.0) -> None:
        """Store what is held; what comes later is stored as it comes. Calling it again does nothing."""
        with self._changed:
            self._closed = True
            folder = self._folder
            self._changed.notify_all()
        atexit.unregister(self._end)
        if folder is not None and folder is not threading.current_thread():
            folder.join(timeout)
        self.flush()

    def _row(self, event: CheckpointEvent) -> Values:
        row = operator_view(event)
        return {
            **row,
            "fingerprint": fingerprint_of(row),
            "last_seen_at": None,
            "trace_id": _trace_id(event),
            "release": _setting("CHECKPOINTER_RELEASE"),
            "environment": _setting("CHECKPOINTER_ENVIRONMENT"),
            "recovery_key": recovery_key(event, self._prefix, _instance()),
        }

    def _see_to_folded(self) -> None:
        if self._folder is None:
            folder = threading.Thread(target=self._fold, name="checkpointer-folder", daemon=True)
            with contextlib.suppress(RuntimeError):  # the interpreter is ending, and `_end` is about to be called
                folder.start()
                self._folder = folder
        if not self._is_known_at_exit:
            # A program that ends without closing loses nothing; one that is killed loses what is held.
            self._is_known_at_exit = True
            atexit.register(self._end)

    def _fold(self) -> None:
        """Store what has been held long enough, until nothing is held."""
        while True:
            with self._changed:
                due_at = self._folding.next_due()
                if due_at is None or self._closed:
                    self._folder = None
                    return
                self._changed.wait(max(0.0, due_at - time.monotonic()))
            self._store(lambda: self._folding.due(time.monotonic()))

    def _store(self, take: Callable[[], list[Values]]) -> None:
        with self._turn:
            with self._changed:
                rows = take()
            for row in rows:
                self._outbox.add(SYSTEM_ERRORS, row)

    def _end(self) -> None:
        self.close(_CLOSE_SECONDS)


def _trace_id(event: CheckpointEvent) -> str | None:
    given = event.context.get("trace_id")
    return safe_name(given, 100) if isinstance(given, str) and given else event.trace_id


def _setting(name: str) -> str | None:
    value = os.environ.get(name)
    return safe_name(value, 200) if value else None


def _instance() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"
