"""Reaches the stream of a run that is going on, so that an event can be put among what the run itself streams.

Not here: what is written there (`observability/hooks/run_stream.py`). A run's *stream writer* is what
`langgraph.config.get_stream_writer()` gives to a node. A saver is called outside of nodes, where that function refuses
to answer; the writer is taken from the config that LangGraph hands over instead. That is a private place: if it is
empty or holds something else, a run has no writer here, and nothing else is missing.
"""

from __future__ import annotations

import contextvars
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from langchain_core.runnables.config import var_child_runnable_config

from checkpointer.flush import run_end

if TYPE_CHECKING:
    from collections.abc import Callable

    from langchain_core.runnables import RunnableConfig

RUNTIME = "__pregel_runtime"
"""The key of a config under which LangGraph hands over what belongs to a run; absent outside of runs."""

# Inner graphs with threads of their own are forgotten when no run is left; this bounds those of a server that never is.
_KNOWN_RUNS = 10_000
# The writer asks for the namespace of whoever writes: at the root every watcher sees it.
_AT_ROOT: Any = {"configurable": {"checkpoint_ns": ""}}


class RunStreams:
    """The stream writers of the runs of this process, by thread; does nothing until it is told to `watch`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._writers: OrderedDict[str, Callable[[Any], None]] = OrderedDict()
        self._watches = False

    def watch(self) -> None:
        """Begin to remember writers."""
        self._watches = True
        run_end.handler().add(self)

    def close(self) -> None:
        """Forget all writers, and remember none from now on; calling it again does nothing."""
        self._watches = False
        run_end.handler().discard(self)
        with self._lock:
            self._writers.clear()

    def renew_lock(self) -> None:
        """In a forked child: the runs are the parent's."""
        self._lock = threading.Lock()
        self._writers.clear()

    def note(self, config: RunnableConfig) -> None:
        """Remember the writer of the run that calls the saver, if it is in one."""
        if not self._watches:
            return
        configurable = config.get("configurable") or {}
        writer = getattr(configurable.get(RUNTIME), "stream_writer", None)
        if callable(writer):
            thread_id = str(configurable.get("thread_id"))
            with self._lock:
                if configurable.get("checkpoint_ns") and thread_id in self._writers:
                    return  # a subgraph's writer leads nowhere unless the caller streams subgraphs too
                self._writers[thread_id] = writer
                self._writers.move_to_end(thread_id)
                if len(self._writers) > _KNOWN_RUNS:
                    self._writers.popitem(last=False)

    def write(self, thread_id: str, chunk: Any) -> bool:
        """Write to the custom stream of a thread's run, from any thread of this process.

        Args:
            thread_id: The LangGraph thread.
            chunk: What those get who stream with `stream_mode="custom"`.

        Returns:
            Whether the thread has a run here that took it. Whether somebody streams in that mode is not known.
        """
        with self._lock:
            writer = self._writers.get(thread_id)
        if writer is None:
            return False

        def write() -> None:
            var_child_runnable_config.set(_AT_ROOT)
            writer(chunk)

        try:
            contextvars.Context().run(write)
        except RuntimeError:  # the run's event loop has just been closed
            return False
        return True

    def run_ended(self, thread_id: str, active: frozenset[str]) -> None:
        """Forget the writer of a run that has ended."""
        with self._lock:
            if not active:
                self._writers.clear()
            elif thread_id not in active:
                self._writers.pop(thread_id, None)
