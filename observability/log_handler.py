"""Files the application's own log records under the thread whose run made them.

Not here: the thread's log itself (`logs.py`). Which thread is running is known from the config that LangGraph sets in
the context of each node, and that what a node calls inherits: tools, chains, tasks and threads that copy the context.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from langchain_core.runnables.config import var_child_runnable_config

from observability.target import current

if TYPE_CHECKING:
    from observability.target import Observability

# What these say may be about storing the very lines that are stored here.
_OWN = ("checkpointer", "observability", "psycopg", "redis")


def running_thread() -> str | None:
    """Return the id of the LangGraph thread whose node is running in this context, None outside of nodes."""
    config = var_child_runnable_config.get()
    thread_id = ((config or {}).get("configurable") or {}).get("thread_id")
    return None if thread_id is None else str(thread_id)


class ThreadLogHandler(logging.Handler):
    """A handler for `logging` that writes records to the log of the running thread.

    `logging.getLogger("myapp").addHandler(ThreadLogHandler())` is all that is needed. A record of a node, or of what it
    calls, goes to its thread; one with `extra={"thread_id": ...}` to that thread; others nowhere, and to the other
    handlers as ever. A line has the record's formatted message, with its exception if it has one. Nothing here waits
    for a server.

    Args:
        level: Records below it are ignored.
        observability: Where the lines go, if not to the active target.
    """

    def __init__(self, level: int = logging.NOTSET, *, observability: Observability | None = None) -> None:
        super().__init__(level)
        self._observability = observability

    def emit(self, record: logging.LogRecord) -> None:
        """File a record; what goes wrong is `logging`'s to report, as with every handler."""
        if record.name.partition(".")[0] in _OWN:
            return
        thread_id = getattr(record, "thread_id", None) or running_thread()
        if thread_id is None:
            return
        try:
            target = self._observability or current()
            target.submit_log_line(self.format(record), thread_id=str(thread_id), level=record.levelname.lower())
        except Exception:  # noqa: BLE001 - a log call must not end the node that makes it
            self.handleError(record)
