"""What LangGraph hands to a saver: states of a size, and the checkpoints of a run that has one.

Not here: measuring.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langgraph.checkpoint.base import Checkpoint, empty_checkpoint
from langgraph.checkpoint.base.id import uuid6

from benchmarks.scale import STATE

if TYPE_CHECKING:
    from benchmarks.lab import Face

MESSAGES = 20
_WORDS = "the weather is fine. "
# What the serializer makes of a message without content.
_OVERHEAD = 198


def messages(size: int = STATE) -> list[AnyMessage]:
    """Make a conversation that is serialised to about so many bytes: 20 messages, or fewer of 250 bytes."""
    count = max(1, min(MESSAGES, size // 250))
    content = (_WORDS * (size // count // len(_WORDS) + 1))[: max(0, size // count - _OVERHEAD)]
    kinds = (HumanMessage, AIMessage)
    return [kinds[i % 2](content, id=str(uuid4())) for i in range(count)]


class Run:
    """One thread on its way, with one channel that changes at each step.

    Args:
        face: The saver.
        thread_id: The thread.
        state: The channel's value.
        others: Channels that stay as they are after the first step.
    """

    def __init__(self, face: Face, thread_id: str, state: Any, others: dict[str, Any] | None = None) -> None:
        self.face = face
        self.thread_id = thread_id
        self.state = state
        self.others = others or {}
        self.step = -1
        self.version: Any = None
        self.versions: dict[str, Any] = {}
        self.here: Any = {"configurable": {"thread_id": thread_id, "checkpoint_ns": ""}}
        # LangGraph gives this to a saver inside of a run.
        self.of_a_run: Any = {"configurable": {**self.here["configurable"], "__pregel_runtime": None}}
        self.config: Any = self.here

    async def start(self) -> None:
        """Read the thread, as each run of a graph does before its first put."""
        await self.face.get_tuple(self.of_a_run)

    def next_checkpoint(self) -> tuple[Checkpoint, Any, Any]:
        """Return what `put` takes beside the config."""
        self.step += 1
        self.version = self.face.saver.get_next_version(self.version, None)
        new = {"messages": self.version}
        if self.step == 0:
            new |= dict.fromkeys(self.others, self.version)
        self.versions = self.versions | new
        checkpoint: Any = {
            **empty_checkpoint(),
            "v": 4,  # as LangGraph's runs write them; with less, a read asks for the parent's writes too
            "id": str(uuid6(clock_seq=self.step)),
            "channel_values": {"messages": self.state, **self.others},
            "channel_versions": self.versions,
            "versions_seen": {"model": self.versions},
        }
        return checkpoint, {"source": "loop", "step": self.step, "parents": {}}, new

    async def put(self, checkpoint: Checkpoint, metadata: Any, versions: Any) -> None:
        """Store a checkpoint."""
        self.config = await self.face.put(self.config, checkpoint, metadata, versions)

    async def put_next(self) -> None:
        """Make and store the next checkpoint."""
        await self.put(*self.next_checkpoint())

    async def put_writes(self) -> None:
        """Store what a task has written."""
        await self.face.put_writes(self.config, [("messages", self.state[-1])], "task-1")

    async def get_tuple(self) -> Any:
        """Read the thread's latest checkpoint."""
        found = await self.face.get_tuple(self.here)
        assert len(found.checkpoint["channel_values"]["messages"]) == len(self.state)
        return found
