"""What an operation can ask its runner to do.

Not here: the operations (`operations.py`, `puts.py`), generators that yield steps and receive their replies, and the
two runners, one blocking, one awaiting (`saver.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from checkpointer.buffer.commands import ScriptCall
from checkpointer.store.reads import Query

if TYPE_CHECKING:
    from collections.abc import Callable

    from checkpointer.flush.session import Session


@dataclass(frozen=True, slots=True)
class Both:
    """Ask Redis and Postgres at the same time.

    The reply is a pair: that of Redis, and the rows or the `StoreUnavailableError`. That Redis cannot be reached is
    raised, as for a call alone. Which of them answers first is open.
    """

    call: ScriptCall
    query: Query


@dataclass(frozen=True, slots=True)
class Job:
    """Work for the flusher's thread."""

    work: Callable[[Session], Any]


@dataclass(frozen=True, slots=True)
class Flushed:
    """Wait until a thread's records up to a sequence number are in Postgres; many callers share a flush."""

    thread_id: str
    upto: int


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait for some seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """Ask Redis for its `INFO`; the answer is a `BufferFacts`."""


RareStep = Query | Both | Job | Flushed | Pause | ServerInfo
Step = ScriptCall | RareStep
