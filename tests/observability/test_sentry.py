"""Events as Sentry gets them, by the application's own client and a transport that keeps them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import sentry_sdk
from sentry_sdk.integrations.logging import LoggingIntegration, unignore_logger
from sentry_sdk.transport import Transport

from checkpointer.events import CheckpointEvent, describe_error
from checkpointer.hooks import Hooks, load_hook
from observability.hooks.console import log_event

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from checkpointer.hooks import HookContext


class Keeping(Transport):
    """Keeps what is to be sent."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.sent: list[Any] = []

    def capture_envelope(self, envelope: Any) -> None:
        self.sent += [item.payload.json for item in envelope.items if item.type == "event"]


@pytest.fixture
def sentry() -> Iterator[list[Any]]:
    """What the application's client sends."""
    transport = Keeping()
    client = sentry_sdk.Client(
        "http://key@127.0.0.1:1/1",
        transport=transport,
        default_integrations=False,
        integrations=[LoggingIntegration()],
        release="app@1",
    )
    scope = sentry_sdk.get_global_scope()
    scope.set_client(client)
    yield transport.sent
    scope.set_client(None)
    unignore_logger("checkpointer.events")


def failure(**more: Any) -> CheckpointEvent:
    def inner() -> None:
        raise KeyError("first")

    def outer() -> None:
        try:
            inner()
        except KeyError as exc:
            raise ValueError("second\nwith password=hunter2") from exc

    try:
        outer()
    except ValueError as exc:
        error = describe_error(exc)
    fields: dict[str, Any] = {
        "name": "flush.failed",
        "severity": "critical",
        "error_type": "checkpoint_flush_error",
        "message": "No access with postgresql://me:hunter2@host/db.",
        "thread_id": "t-1",
        "run_id": "run-1",
        "component": "flusher",
        "operation": "flush",
        "outcome": "retrying",
        "checkpoint_count": 4,
        "error": error,
        "context": {"api_key": "hunter2", "waiting_records": 5},
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
    }
    return CheckpointEvent(**{**fields, **more})


def test_an_error_becomes_an_event_with_level_tags_and_fingerprint(context: HookContext, sentry: list[Any]) -> None:
    hook: Any = load_hook("sentry", context)
    event = failure()
    hook(event)
    (sent,) = sentry
    assert sent["event_id"] == event.event_id.hex
    assert (sent["level"], sent["logger"], sent["release"]) == ("fatal", "checkpointer", "app@1")
    assert sent["timestamp"].startswith(event.occurred_at.strftime("%Y-%m-%dT%H:%M:%S"))
    assert sent["tags"] == {
        "error_type": "checkpoint_flush_error",
        "component": "flusher",
        "operation": "flush",
        "outcome": "retrying",
        "thread_id": "t-1",
        "run_id": "run-1",
        "event": "flush.failed",
        "checkpointer_prefix": context.prefix,
        "checkpoint_trace_id": "0af7651916cd43dd8448eb211c80319c",
    }
    assert sent["contexts"]["checkpoint"]["checkpoint_count"] == 4
    assert sent["contexts"]["checkpoint"]["waiting_records"] == 5
    hook(failure(thread_id="t-2", message="Other words.", context={}))
    assert sentry[1]["fingerprint"] == sent["fingerprint"]
    hook(failure(operation="drain"))
    assert sentry[2]["fingerprint"] != sent["fingerprint"]


def test_an_exception_has_its_cause_and_its_frames(context: HookContext, sentry: list[Any]) -> None:
    hook: Any = load_hook("sentry", context)
    hook(failure())
    cause, last = sentry[0]["exception"]["values"]
    assert (cause["type"], cause["value"]) == ("KeyError", "'first'")
    assert [frame["function"] for frame in cause["stacktrace"]["frames"]] == ["outer", "inner"]
    assert (last["type"], last["value"]) == ("ValueError", "second\nwith password=[scrubbed]")
    assert [frame["function"] for frame in last["stacktrace"]["frames"]] == ["failure", "outer"]
    frame = last["stacktrace"]["frames"][-1]
    assert frame["filename"] == __file__
    assert frame["lineno"] > 50
    assert "raise ValueError" in frame["context_line"]
    assert frame["in_app"]


@pytest.mark.parametrize(
    ("severity", "level"), [("warning", "warning"), ("error", "error"), ("critical", "fatal"), ("info", None)]
)
def test_levels_are_those_of_sentry_and_what_is_no_error_is_not_sent(
    severity: Any, level: str | None, context: HookContext, sentry: list[Any]
) -> None:
    hook: Any = load_hook("sentry", context)
    hook(failure(severity=severity))
    hook(failure(severity=severity, error_type=None))
    assert [sent["level"] for sent in sentry] == ([level] if level else [])


def test_no_secret_gets_there_and_hostile_text_does(context: HookContext, sentry: list[Any]) -> None:
    hook: Any = load_hook("sentry", context)
    hook(failure(thread_id="\ud800\x00" + "t" * 5_000, message="\x00\ud800<script>"))
    hook(failure())
    assert len(sentry) == 2
    assert "hunter2" not in repr(sentry)
    assert len(sentry[0]["tags"]["thread_id"]) <= 200


def test_what_the_console_hook_logs_is_not_sent_a_second_time(context: HookContext, sentry: list[Any]) -> None:
    event = failure()
    log_event(event)
    assert len(sentry) == 1, "by Sentry's own integration"
    hook: Any = load_hook("sentry", context)
    hook(event)
    log_event(event)
    assert [sent["event_id"] for sent in sentry[1:]] == [event.event_id.hex]
    logging.getLogger("app").error("something else")
    assert len(sentry) == 3


def test_without_a_client_it_says_so_once_and_never_makes_one(
    context: HookContext, caplog: pytest.LogCaptureFixture
) -> None:
    hook: Any = load_hook("sentry", context)
    hook(failure())
    hook(failure())
    unignore_logger("checkpointer.events")
    assert caplog.text.count("sentry_sdk.init") == 1
    assert not sentry_sdk.get_client().is_active()


def test_a_client_that_is_set_up_later_is_used(
    context: HookContext, sentry: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    client = sentry_sdk.get_client()
    sentry_sdk.get_global_scope().set_client(None)
    hook: Any = load_hook("sentry", context)
    hook(failure())
    sentry_sdk.get_global_scope().set_client(client)
    hook(failure())
    assert len(sentry) == 1


def test_a_client_that_fails_harms_nobody(
    context: HookContext, sentry: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(sentry_sdk, "capture_event", fails)
    hooks = Hooks()
    others: list[CheckpointEvent] = []
    hooks.add(load_hook("sentry", context), name="sentry")
    hooks.add(others.append)
    hooks.emit(failure())
    assert hooks.flush(5)
    assert hooks.stats()["sentry"].failed == 1
    assert others[0].name == "flush.failed"
    hooks.close()


def test_a_saver_tells_sentry_of_what_goes_wrong(make: Callable[..., Any], sentry: list[Any]) -> None:
    from helpers import put_one

    saver = make(hooks=("sentry",))
    put_one(saver, "t", float("nan"))
    assert saver.hooks.flush(5)
    assert [sent["tags"]["event"] for sent in sentry] == ["put.sanitized"]
