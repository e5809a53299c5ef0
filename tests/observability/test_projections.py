"""Users see chosen sentences, operators see everything."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest

from checkpointer.events import CheckpointEvent, describe_error
from checkpointer.hooks import HookContext, load_hook
from observability.projections import operator_view, user_view
from observability.scrub import safe_json, safe_text

SECRET = "postgresql://bob:hunter2@db.internal/app"

NAMES = [
    "flush.failed",
    "flush.incomplete",
    "flush.recovered",
    "put.failed",
    "put.refused",
    "put.around",
    "put.sanitized",
    "backend.down",
    "backend.up",
    "read.unverified",
    "recovery.found",
    "checkpoint.lost",
]


def event(name: str = "flush.failed", **facts: Any) -> CheckpointEvent:
    try:
        raise RuntimeError(SECRET)
    except RuntimeError as exc:
        values: dict[str, Any] = {
            "severity": "critical",
            "message": SECRET,
            "thread_id": "t",
            "error": describe_error(exc),
            "context": {"x": SECRET},
            "component": SECRET,
            "operation": SECRET,
            "run_id": SECRET,
            "checkpoint_ns": SECRET,
            "checkpoint_id": SECRET,
        }
        return CheckpointEvent(name=name, **(values | facts))


@pytest.mark.parametrize("name", [*NAMES, "something.new"])
@pytest.mark.parametrize("outcome", [None, "retrying", "buffered", "recovered", "lost"])
def test_the_user_view_holds_nothing_but_chosen_sentences(name: str, outcome: Any) -> None:
    view = user_view(event(name, outcome=outcome, lost_from_step=3, checkpoint_count=2))
    assert set(view) <= {
        "type", "severity", "message", "thread_id", "timestamp", "event_id", "checkpoint_count",
        "lost_from_step", "outcome",
    }  # fmt: skip
    for word in ("hunter2", "bob", "internal", "RuntimeError", "Traceback", "test_projections"):
        assert word not in str(view)
    # A run goes on after a loss, so that later steps are saved again.
    said = "It begins with step 3." if name == "checkpoint.lost" else "Steps 3 onward are not saved."
    assert said in view["message"]


def test_each_name_of_the_saver_has_a_sentence_of_its_own() -> None:
    messages = {user_view(event(name))["message"] for name in NAMES}
    assert len(messages) == len(NAMES)
    assert user_view(event("something.new"))["message"] not in messages


@pytest.mark.parametrize(
    ("severity", "wire"), [("info", "info"), ("warning", "warning"), ("error", "critical"), ("critical", "critical")]
)
def test_severities_on_the_wire(severity: Any, wire: str) -> None:
    assert user_view(event(severity=severity))["severity"] == wire


def test_a_flush_always_says_how_many_checkpoints() -> None:
    assert operator_view(event("flush.failed"))["error_context"]["checkpoint_count"] == 0
    assert operator_view(event("flush.failed", checkpoint_count=4))["error_context"]["checkpoint_count"] == 4
    assert "checkpoint_count" not in operator_view(event("backend.down"))["error_context"]


def test_a_context_cannot_overwrite_the_facts_nor_grow_without_bounds() -> None:
    view = operator_view(event(context={"attempt": 99, "checkpoint_count": 99}, checkpoint_count=1))
    assert view["error_context"]["attempt"] == 1
    assert view["error_context"]["checkpoint_count"] == 1
    big = operator_view(event(context={str(n): "x" * 4_000 for n in range(100)}))
    assert set(big["error_context"]) >= {"exception_type", "context_left_out_bytes"}


def test_scrubbing_stays_quick_on_hostile_text() -> None:
    repeated = ("://", "password", "eyJ-", "eyJ", "a@", "bearer ", "secret-", "sk-", "gho_", "token=", "cookie:")
    hostile = [piece * 20_000 for piece in repeated]
    hostile += [start + filler * 50_000 for start in ("://", "cookie", "token", "bearer") for filler in "a -"]
    begun = time.perf_counter()
    for text in hostile:
        safe_text(text, 16_000)
    assert time.perf_counter() - begun < 5


def test_a_walk_over_a_huge_or_endless_value_ends() -> None:
    endless: dict[str, Any] = {}
    endless["self"] = endless
    wide = [[["x"] * 200] * 200] * 200
    begun = time.perf_counter()
    safe_json({"endless": endless, "wide": wide})
    assert time.perf_counter() - begun < 5


class Unreadable(dict[str, Any]):
    def items(self) -> Any:
        raise RuntimeError(SECRET)


def test_a_value_that_cannot_be_read_is_named() -> None:
    assert safe_json([Unreadable(a=1)]) == ["<unreadable Unreadable>"]


def unreachable() -> Any:
    raise AssertionError("the console needs no connection")


def test_the_console_writes_one_line_and_the_stack_of_a_critical_one(caplog: pytest.LogCaptureFixture) -> None:
    hook = load_hook("console", HookContext(unreachable, unreachable, "p", "p"))
    with caplog.at_level(logging.INFO, "checkpointer.events"):
        hook(event(severity="info", message="all\nwell", error=None))
        hook(event(severity="warning"))
        hook(event(severity="critical", message="the flush failed", checkpoint_count=2))
    info, warning, critical = (record.getMessage() for record in caplog.records)
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING", "CRITICAL"]
    assert "all\\nwell" in info
    assert "\n" not in warning
    assert critical.startswith("flush.failed: the flush failed thread=t")
    assert "checkpoints=2" in critical
    assert "in event\n  |     raise RuntimeError" in critical
    assert "hunter2" not in caplog.text


def test_nothing_in_an_event_can_forge_a_line_of_the_log_or_steer_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    hostile = "x\n2026-01-01 INFO all is well\r\x1b[2J\x9b31m\u2028\u202egnp\x85\x07"
    try:
        raise ValueError(hostile)
    except ValueError as exc:
        told = event(message=hostile, thread_id=hostile, error=describe_error(exc), operation=hostile)
    hook = load_hook("console", HookContext(unreachable, unreachable, "p", "p"))
    with caplog.at_level(logging.INFO, "checkpointer.events"):
        hook(told)
    first, *stack = caplog.records[0].getMessage().split("\n")
    assert first.startswith("flush.failed: x\\n2026-01-01 INFO all is well\\r\\x1b[2J\\x9b31m\\u2028\\u202egnp")
    assert all(line.startswith("  | ") for line in stack)
    assert any("all is well" in line for line in stack)
    assert not set(caplog.records[0].getMessage()) & set("\r\x1b\x9b\u2028\u202e\x85\x07")
