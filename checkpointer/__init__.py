"""A LangGraph checkpoint saver: a Redis buffer in front of Postgres.

`BufferedPostgresSaver` takes the place of LangGraph's `PostgresSaver`. Where things are, in the order of a put's way:
`saver` (LangGraph's contract), `operations` and `puts` (its steps), `records` and `sanitize` (what is stored),
`buffer` (Redis), `flush` (from Redis to Postgres), `store` (Postgres), `merge` (one read from both), `events` and
`hooks` (who is told).
"""

from checkpointer.errors import (
    AcknowledgementError,
    BufferUnavailableError,
    CheckpointerError,
    CheckpointLostError,
    ClosedError,
    ConfigurationError,
    FlushIncompleteError,
    InvalidConfigError,
    MigrationError,
    NonFiniteValueError,
    NotSetUpError,
    StoreUnavailableError,
    TierUnavailableError,
    UnknownDeadLetterError,
    UnserializableValueError,
    UnsupportedServerError,
    WrongLoopError,
)
from checkpointer.events import CheckpointEvent
from checkpointer.flush.dead_letters import DeadLetter
from checkpointer.flush.report import FlushReport
from checkpointer.options import BufferOptions
from checkpointer.sanitize import sanitize_for_json
from checkpointer.saver import BufferedPostgresSaver

__all__ = [
    "BufferedPostgresSaver",
    "BufferOptions",
    "CheckpointEvent",
    "DeadLetter",
    "FlushReport",
    "sanitize_for_json",
    "CheckpointerError",
    "AcknowledgementError",
    "BufferUnavailableError",
    "CheckpointLostError",
    "ClosedError",
    "ConfigurationError",
    "FlushIncompleteError",
    "InvalidConfigError",
    "MigrationError",
    "NonFiniteValueError",
    "NotSetUpError",
    "StoreUnavailableError",
    "TierUnavailableError",
    "UnknownDeadLetterError",
    "UnserializableValueError",
    "UnsupportedServerError",
    "WrongLoopError",
]
