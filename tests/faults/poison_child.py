"""What the processes do that the poison test kills, right after a commit and before they tell Redis."""

from __future__ import annotations

import os
import signal
from typing import Any

from checkpointer import BufferedPostgresSaver


def run(postgres_uri: str, redis_url: str, prefix: str, work: str) -> None:
    """Flush, replay or drop, and die once Postgres has committed it."""
    saver = BufferedPostgresSaver.from_conn_string(
        postgres_uri, redis_url=redis_url, prefix=prefix, hooks=(), triggers=frozenset()
    )
    session = saver._core.flusher._session
    locked = session.locked

    class Dying:
        """A transaction after which the process is no more."""

        def __init__(self, *args: Any) -> None:
            self._inner = locked(*args)

        def __enter__(self) -> Any:
            return self._inner.__enter__()

        def __exit__(self, *args: Any) -> Any:
            self._inner.__exit__(*args)
            os.kill(os.getpid(), signal.SIGKILL)

    session.locked = Dying  # type: ignore[method-assign,assignment]
    if work == "flush":
        saver.flush()
    elif work == "replay":
        saver.dead_letters.replay()
    else:
        saver.dead_letters.drop(saver.dead_letters.list()[0].id)
