"""Learns from LangChain's callbacks when a graph's run has ended, however it ended.

Not here: flushing. A root run's `on_chain_end` or `on_chain_error` fires after its loop has left and every save has
been made: at normal completion, an interrupt, a node's error, the recursion limit, a cancellation and an abandoned
stream. Nothing fires for `update_state` or when the process is killed; age and recovery cover those.

The handler is registered once for the process, at the first saver; it is the package's one piece of global state,
since LangChain has no other place for it.
"""

from __future__ import annotations

import threading
import weakref
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.tracers.context import register_configure_hook

if TYPE_CHECKING:
    from uuid import UUID


class Listener(Protocol):
    """Wants to know of ended runs."""

    def run_ended(self, thread_id: str, active: frozenset[str]) -> None:
        """Take note; `active` are the threads of the root runs that go on."""


class RunEndHandler(BaseCallbackHandler):
    """Tells listeners which thread's run has ended. Never blocks, and costs a dictionary entry for each root run."""

    run_inline = True  # it does not block, so asynchronous runs need no thread for it

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active: dict[UUID, str] = {}
        self._listeners: weakref.WeakSet[Listener] = weakref.WeakSet()

    ignore_llm = True
    ignore_retry = True
    ignore_agent = True
    ignore_retriever = True
    ignore_chat_model = True
    ignore_custom_event = True

    def add(self, listener: Listener) -> None:
        """Subscribe a listener; it is held weakly."""
        with self._lock:
            self._listeners.add(listener)

    def discard(self, listener: Listener) -> None:
        """Unsubscribe a listener."""
        with self._lock:
            self._listeners.discard(listener)

    def on_chain_start(
        self,
        serialized: dict[str, Any] | None,
        inputs: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Note the start of a root run that has a thread."""
        if parent_run_id is not None or not metadata or "langgraph_node" in metadata:
            return
        thread_id = metadata.get("thread_id")
        if thread_id is not None:
            self._active[run_id] = str(thread_id)

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """Note the end of a run."""
        self._ended(run_id)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Note the end of a run that failed, was interrupted or was cancelled."""
        self._ended(run_id)

    def _ended(self, run_id: UUID) -> None:
        thread_id = self._active.pop(run_id, None)
        if thread_id is None:
            return
        with self._lock:
            listeners = list(self._listeners)
            active = frozenset(self._active.values())
        for listener in listeners:
            listener.run_ended(thread_id, active)


_handler: ContextVar[RunEndHandler | None] = ContextVar("checkpointer_run_end", default=None)
_registered: RunEndHandler | None = None
_registering = threading.Lock()


def handler() -> RunEndHandler:
    """Return the process's handler, registered with LangChain at the first call."""
    global _handler, _registered
    with _registering:
        if _registered is None:
            _registered = RunEndHandler()
            # The default makes it visible in every thread and context, whenever they were created.
            _handler = ContextVar("checkpointer_run_end", default=_registered)
            register_configure_hook(_handler, inheritable=False)
        return _registered
