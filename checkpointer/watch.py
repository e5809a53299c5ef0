"""A thread that looks at both servers now and then: do they answer, how much waits, how many dead letters are open.

Not here: what is made of it (`worker.py`, `readings.py`). A *look* is one round: whoever wants to know gets what the
last one has shown, and waits for nothing. A saver has one only while somebody reads its metrics.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, TypeVar

from checkpointer.errors import CheckpointerError
from checkpointer.events import describe_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from checkpointer.flush.backlog import Backlog
    from checkpointer.flush.session import Session

T = TypeVar("T")

# A look costs one Redis command for each waiting thread: the pause makes that a twentieth of the time at most.
_LOOK_SHARE = 20
_LONGEST_PAUSE = 15.0
_ANSWER_SECONDS = 5.0


class Watcher:
    """Looks, from `start` to `close`.

    Args:
        make_session: Makes the connections of its thread.
        pause: Seconds between two looks, or more if a look takes long.
    """

    def __init__(self, make_session: Callable[[], Session], pause: float) -> None:
        self._make_session = make_session
        self._pause = pause
        self._closed = False
        self.forget()

    def forget(self) -> None:
        """In a forked child: the thread and its connections are the parent's."""
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._session: Session | None = None
        self._looked = False
        self._backlog: Backlog | None = None
        self._dead_letters: int | None = None
        self._redis_trouble: str | None = None
        self._postgres_trouble: str | None = None
        self._asked_at: float | None = None

    def start(self) -> None:
        """Begin to look; does nothing if it has begun, or is closed."""
        if self._thread is not None or self._closed:
            return
        with self._lock:
            if self._thread is None and not self._closed:
                self._session = self._make_session()
                thread = threading.Thread(
                    target=self._watch, args=(self._session,), name="checkpointer-watch", daemon=True
                )
                thread.start()
                self._thread = thread

    def close(self) -> None:
        """Look no more. May be called again."""
        with self._lock:
            self._closed = True
            thread, session = self._thread, self._session
        self._closing.set()
        if thread is not None and session is not None:
            thread.join(1.0)
            session.give_up()
            thread.join(0.5)

    def _watch(self, session: Session) -> None:
        closing = self._closing
        while not closing.is_set():
            begun = time.monotonic()
            self._backlog, self._redis_trouble = _ask(session.backlog)
            pause = (time.monotonic() - begun) * _LOOK_SHARE if self._redis_trouble is None else 0.0
            self._asked_at = time.monotonic()
            self._dead_letters, self._postgres_trouble = _ask(session.open_dead_letters)
            self._asked_at = None
            self._looked = True
            closing.wait(min(max(self._pause, pause), _LONGEST_PAUSE))
        session.close()

    @property
    def has_looked(self) -> bool:
        """Whether the first look is done."""
        return self._looked

    @property
    def backlog(self) -> Backlog | None:
        """What waits in the buffer, as of the last look; None if Redis did not answer."""
        return self._backlog

    @property
    def dead_letters(self) -> int | None:
        """How many dead letters are open, as of the last look; None if Postgres did not answer."""
        return self._dead_letters

    @property
    def redis_trouble(self) -> str | None:
        """Why Redis did not answer at the last look; None if it did."""
        return self._redis_trouble

    @property
    def postgres_trouble(self) -> str | None:
        """Why Postgres did not answer at the last look, or has not answered for long; None if it did."""
        asked_at = self._asked_at
        if asked_at is not None and (seconds := time.monotonic() - asked_at) > _ANSWER_SECONDS:
            return f"Postgres has not answered for {seconds:.0f} s."
        return self._postgres_trouble


def _ask(question: Callable[[], T]) -> tuple[T | None, str | None]:
    """Return the answer, or what is wrong."""
    try:
        return question(), None
    except CheckpointerError as exc:
        return None, str(exc)
    except Exception as exc:  # noqa: BLE001 - whatever it is, it is what the operator asks for
        return None, describe_error(exc).message
