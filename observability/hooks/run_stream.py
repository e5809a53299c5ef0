"""The hook that puts what a thread's user is to know into the stream of the run that is going on.

It is not among the standard hooks, since it adds chunks to what an application streams with `stream_mode="custom"`:
whoever reads those has to expect them. Name it to have it: `hooks=(*STANDARD_HOOKS, "run_stream")`.

Only events of the process that executes the run can get there. Those of a worker, and of the time after the run, reach
watchers by `observability.subscribe_run_events`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from observability.mappings import stream_chunk
from observability.projections import is_for_user

if TYPE_CHECKING:
    from checkpointer.events import CheckpointEvent
    from checkpointer.hooks import Hook, HookContext


def create(context: HookContext) -> Hook:
    """Return the run-stream hook."""
    streams = context.run_streams
    streams.watch()

    def run_stream(event: CheckpointEvent) -> None:
        if event.thread_id is not None and is_for_user(event):
            streams.write(event.thread_id, stream_chunk(event))

    return run_stream
