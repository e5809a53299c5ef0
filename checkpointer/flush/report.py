"""What a flush says about itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from checkpointer.events import ErrorInfo


@dataclass(slots=True)
class FlushReport:
    """The outcome of a flush; true only if everything asked for is in Postgres.

    Attributes:
        threads: How many threads had something to flush.
        checkpoints: Checkpoints that are now in Postgres.
        blobs: Channel versions that are now in Postgres.
        writes: Pending writes that are now in Postgres.
        waiting: Records asked for that are still in the buffer and will be retried.
        waiting_threads: The threads of those records, at most 100.
        error: Why the flush failed; None if it succeeded, or just could not finish.
    """

    threads: int = 0
    checkpoints: int = 0
    blobs: int = 0
    writes: int = 0
    waiting: int = 0
    waiting_threads: list[str] = field(default_factory=list)
    error: ErrorInfo | None = None

    def __bool__(self) -> bool:
        """Whether everything asked for is in Postgres."""
        return self.waiting == 0 and self.error is None and not self.waiting_threads
