"""What the savers of the demo have acknowledged, noted put by put, so that it can be looked up in Postgres later.

Not here: the looking up (`proof.py`).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from langgraph.checkpoint.base import WRITES_IDX_MAP

from checkpointer.saver import BufferedPostgresSaver

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_core.runnables import RunnableConfig

__all__ = ["Acknowledged", "Checkpoint", "NotingSaver", "Write"]

Checkpoint = tuple[str, str, str]
"""Thread, namespace, checkpoint: the primary key of `checkpoints`."""

Write = tuple[str, str, str, str, int]
"""Thread, namespace, checkpoint, task, index: the primary key of `checkpoint_writes`."""


@dataclass
class Acknowledged:
    """What was acknowledged by all savers that note here; used from any thread.

    Attributes:
        checkpoints: For which a put has returned.
        writes: For which a `put_writes` has returned.
    """

    checkpoints: set[Checkpoint] = field(default_factory=set)
    writes: set[Write] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def note_put(self, saved: RunnableConfig) -> None:
        """Note what a put has returned."""
        place = saved["configurable"]
        with self._lock:
            self.checkpoints.add((place["thread_id"], place["checkpoint_ns"], place["checkpoint_id"]))

    def note_writes(self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str) -> None:
        """Note what a `put_writes` was given, once it has returned."""
        place = config["configurable"]
        checkpoint = (place["thread_id"], place["checkpoint_ns"], place["checkpoint_id"])
        with self._lock:
            for position, (channel, _) in enumerate(writes):
                self.writes.add((*checkpoint, task_id, WRITES_IDX_MAP.get(channel, position)))

    def thread_ids(self) -> list[str]:
        """Return the threads of which anything was acknowledged."""
        with self._lock:
            return sorted({checkpoint[0] for checkpoint in self.checkpoints})

    def copy(self) -> Acknowledged:
        """Return what was acknowledged until now."""
        with self._lock:
            return Acknowledged(set(self.checkpoints), set(self.writes))


class NotingSaver(BufferedPostgresSaver):
    """A saver as any other, that notes what it has acknowledged."""

    def __init__(self, postgres_uri: str, redis_url: str, acknowledged: Acknowledged, **settings: Any) -> None:
        super().__init__(postgres_uri, redis_url, **settings)
        self._acknowledged = acknowledged

    def put(self, *args: Any, **kwargs: Any) -> RunnableConfig:
        """See `BufferedPostgresSaver.put`."""
        saved = super().put(*args, **kwargs)
        self._acknowledged.note_put(saved)
        return saved

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """See `BufferedPostgresSaver.put_writes`."""
        super().put_writes(config, writes, task_id, task_path)
        self._acknowledged.note_writes(config, writes, task_id)
