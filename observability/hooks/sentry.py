"""The hook that makes each event that is an error an event of Sentry, by the client that the application has set up.

It sets up none of its own: without `sentry_sdk.init(...)` it says so once, and does nothing. Sentry's own rules
(`before_send`, sampling, the release) hold for these events too. What Sentry is told is what `system_errors` is told,
with secrets blanked, and the thread's identifier; nothing of the state.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any, Literal

from checkpointer.events import SEVERITIES
from observability.extras import missing_extra
from observability.hooks import console
from observability.projections import operator_view
from observability.scrub import safe_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sentry_sdk.types import Event

    from checkpointer.events import CheckpointEvent, ErrorInfo, Severity
    from checkpointer.hooks import Hook, HookContext

logger = logging.getLogger("checkpointer.observability")

_SENT = SEVERITIES[SEVERITIES.index("warning") :]
_LEVELS: Mapping[Severity, Literal["info", "warning", "error", "fatal"]] = {
    "info": "info",
    "warning": "warning",
    "error": "error",
    "critical": "fatal",
}
# By the names that they have in `operator_view`; Sentry takes at most 200 characters.
_TAGS = ("error_type", "component", "operation", "outcome", "error_code", "thread_id", "run_id")
_TAG_LIMIT = 200
_FRAME = re.compile(
    r'^  File "([^\n]{1,1000})", line (\d{1,9}), in ([^\n]{1,300})\n(?:    ([^\n]{0,500})\n)?', re.MULTILINE
)
_NOT_IN_APP = re.compile(r"[/\\](?:site|dist)-packages[/\\]|[/\\]lib(?:64)?[/\\]python\d|^<")


def create(context: HookContext) -> Hook:
    """Return the Sentry hook. What the console hook logs is no longer taken for further errors by Sentry.

    Raises:
        ConfigurationError: The library is not installed.
    """
    try:
        from sentry_sdk.integrations.logging import ignore_logger
    except ModuleNotFoundError as exc:
        raise missing_extra("To tell Sentry of errors", "sentry") from exc
    ignore_logger(console.logger.name)
    return SentryHook(context.prefix)


class SentryHook:
    """Sends what is more than `info` and has an error type.

    Args:
        prefix: The tag `checkpointer_prefix`.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._has_complained = False

    def __call__(self, event: CheckpointEvent) -> None:
        """Hand an event to Sentry's client, which sends it in a thread of its own."""
        import sentry_sdk

        if event.error_type is None or event.severity not in _SENT:
            return
        if not sentry_sdk.get_client().is_active():
            if not self._has_complained:
                self._has_complained = True
                logger.warning("Sentry is not told of errors: the application has not called sentry_sdk.init(...).")
            return
        sentry_sdk.capture_event(sentry_event(event, self._prefix))


def sentry_event(event: CheckpointEvent, prefix: str) -> Event:
    """Return an event as Sentry's `capture_event` takes it.

    Its id is that of the event, so that one that is sent twice is one. Its fingerprint leaves out what differs from one
    occurrence to the next: the message, the thread, the lines of the stack.
    """
    row = operator_view(event)
    error = event.error
    tags = {name: row[name] for name in _TAGS} | {
        "event": event.name,
        "checkpointer_prefix": prefix,
        "checkpoint_trace_id": event.trace_id,
    }
    found: Event = {
        "event_id": event.event_id.hex,
        "timestamp": row["created_at"],
        "platform": "python",
        "level": _LEVELS[event.severity],
        "logger": "checkpointer",
        "logentry": {"formatted": row["error_message"]},
        "fingerprint": [
            "checkpointer",
            row["error_type"],
            safe_text(error.type, 200) if error else "",
            row["component"] or "",
            row["operation"] or "",
            row["error_code"] or "",
        ],
        "tags": {name: str(value)[:_TAG_LIMIT] for name, value in tags.items() if value is not None},
        "contexts": {
            "checkpoint": {
                "thread_id": row["thread_id"],
                "run_id": row["run_id"],
                "checkpoint_ns": row["checkpoint_ns"],
                "checkpoint_id": row["checkpoint_id"],
                **row["error_context"],
            }
        },
    }
    if error is not None:
        found["exception"] = {"values": _exceptions(error)}
    return found


def _exceptions(error: ErrorInfo) -> list[dict[str, Any]]:
    """Return the exception and its causes, innermost cause first as Sentry has it, each with its frames."""
    stack = error.stack
    values = []
    for line in [*reversed(error.causes), f"{error.type}: {error.message}"]:
        # What the stack says of each ends with this line; of one that is cut off at its beginning there are no frames.
        own, found, rest = stack.partition(f"{line}\n")
        if found:
            stack = rest
        kind, _, message = line.partition(": ")
        values.append(
            {
                "type": safe_text(kind, 200),
                "value": safe_text(message),
                "stacktrace": {"frames": [_frame(*match) for match in _FRAME.findall(own if found else "")]},
            }
        )
    return values


def _frame(path: str, line: str, function: str, source: str) -> dict[str, Any]:
    return {
        "filename": safe_text(path, 500),
        "lineno": int(line),
        "function": safe_text(function, 200),
        "context_line": safe_text(source, 500),
        "in_app": not _NOT_IN_APP.search(path),
    }
