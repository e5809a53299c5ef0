"""A failure of every kind is produced, and whoever should see it does; the guide to failures says what they see."""

from __future__ import annotations

import inspect
import itertools
import re
from typing import TYPE_CHECKING, Any

import failure_guide
import pytest
from command_line import command
from failures import FAILURES, Failure
from scenes import THREAD, Scene
from test_events_document import documented

from checkpointer import CheckpointerError, TierUnavailableError, embedded, errors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scenes import Sight

EVENTS = set(documented())
BASES = {CheckpointerError.__name__, TierUnavailableError.__name__}
EXCEPTIONS = {name for name, _ in inspect.getmembers(errors, inspect.isclass)} - BASES
LEVELS = {"info": "INFO", "warning": "WARNING", "error": "ERROR", "critical": "CRITICAL"}

# Of an event of a process that is gone the metrics are gone too, and what the application reports is stored only.
UNSEEN = {
    "buffer.abandoned": {"console", "metric"},
    "worker.not_drained": {"metric"},
    "application.error": {"console", "metric"},
}


@pytest.fixture(scope="module")
def pair(server_programs: None) -> Iterator[embedded.Servers]:
    # Synced before the answer, so that a killed Redis has forgotten nothing.
    with embedded.servers(valkey_args=("--appendfsync", "always")) as servers:
        yield servers


def due(name: str) -> set[str]:
    """Return who has to see an event, by what the document of events says of it."""
    fields = documented()[name]
    ways = {"console", "metric"}
    if fields.get("user_notice"):
        ways |= {"log", "browser"}
    if fields["severity"] != "info":
        ways |= {"row", "api"}
    return ways - UNSEEN.get(name, set())


def seen_by(sight: Sight, name: str, event_ids: set[str]) -> set[str]:
    """Return who has seen the events of a name: all of them, as severe as they are."""
    severity = documented()[name]["severity"]
    kind = documented()[name].get("error_type", name)

    def has_all(found: list[dict[str, Any]], **expected: object) -> bool:
        by_id = {str(one["event_id"]): one for one in found}
        return all(event_id in by_id and expected.items() <= by_id[event_id].items() for event_id in event_ids)

    of_users = {"info": "info", "warning": "warning"}.get(severity, "critical")
    stored: dict[str, object] = {"severity": severity}
    if name not in ("application.error", "backend.down"):  # which have several types
        stored["error_type"] = kind
    line = re.compile(rf"{LEVELS[severity]} {re.escape(name)}: ")
    sample = f'checkpointer_events_total{{name="{name}",prefix="support",severity="{severity}"}}'
    facts = {
        "console": sum(bool(line.match(entry)) for entry in sight.console) >= len(event_ids),
        "metric": sight.metrics.get(sample, 0) >= len(event_ids),
        "log": has_all(sight.log, level=of_users) and has_all(sight.lines, level=of_users, thread_id=THREAD),
        "browser": has_all(sight.browser, severity=of_users, thread_id=THREAD),
        "row": has_all(sight.rows, **stored),
        "api": has_all(sight.listed, **stored) and has_all(sight.details, **stored),
    }
    return {way for way, is_true in facts.items() if is_true}


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.name)
def test_whoever_should_see_a_failure_does_and_the_guide_says_what(pair: embedded.Servers, failure: Failure) -> None:
    with Scene(pair) as here:
        failure.produce(here)
        sight = here.look()
    ids: dict[str, set[str]] = {}
    for event in here.events:
        ids.setdefault(event.name, set()).add(str(event.event_id))
    for row in sight.rows:
        # Other processes leave nothing but their traces.
        ids.setdefault(row["error_context"]["event"], set()).add(str(row["event_id"]))
    for name in failure.shows & EVENTS:
        assert name in ids
        assert due(name) <= seen_by(sight, name, ids[name]), name
    assert failure.shows & EXCEPTIONS <= {name for name, _ in sight.raised}
    parts = failure_guide.parts()
    if failure.name in parts:
        again = "python tests/failure_guide.py --write"
        assert parts[failure.name].strip() == failure_guide.render(sight).strip(), again


def test_every_event_and_every_exception_is_produced() -> None:
    assert {sign for failure in FAILURES for sign in failure.shows} == EVENTS | EXCEPTIONS


def test_the_table_has_every_event_and_every_exception_once_and_nothing_else() -> None:
    named = [row[1].strip("`") for row in failure_guide.table()]
    assert sorted(named) == sorted(EVENTS | EXCEPTIONS)
    assert all(all(cell.strip() for cell in row) for row in failure_guide.table())


def test_the_guide_shows_failures_that_there_are() -> None:
    assert len(failure_guide.parts()) == 8
    assert set(failure_guide.parts()) <= {failure.name for failure in FAILURES}


def test_the_commands_of_the_guide_are_commands() -> None:
    text = failure_guide.DOCUMENT.read_text()
    inline = re.findall(r"`checkpointer ([a-z][^`]*)`", text)
    blocks = re.findall(r"^checkpointer ([^#\n]*)", text, re.MULTILINE)
    assert len(blocks) == 3
    for words in {tuple(found.split()) for found in inline + blocks}:
        name = list(itertools.takewhile(re.compile(r"[a-z-]+").fullmatch, words))
        options = {word for word in words if word.startswith("--")}
        helped = command(*(word for word in name if word not in options), "--help")
        assert helped.code == 0, words
        assert options <= set(re.findall(r"--[a-z-]+", helped.out)), words


def test_what_the_guide_says_of_metrics_is_said_of_metrics_that_there_are() -> None:
    known = (failure_guide.DOCUMENT.parent / "metrics.md").read_text()
    named = set(re.findall(r"`(checkpointer_[a-z_]+)`", failure_guide.DOCUMENT.read_text()))
    assert named
    assert all(f"`{name}`" in known for name in named), named
