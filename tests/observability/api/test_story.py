"""From a failure to its return: what the user sees, what an administrator finds and does, and that it comes back."""

from __future__ import annotations

import contextlib
import logging
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypedDict

import httpx
import pytest
from helpers import wait_until
from langgraph.graph import END, START, StateGraph
from poisoning import allow, config, forbid, put_steps
from savers import NOTHING
from test_streams import connected, event

from checkpointer import BufferedPostgresSaver, NonFiniteValueError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import psycopg
    from conftest import Served

    Connection = psycopg.Connection[Any]
    Happening = Callable[[BufferedPostgresSaver, Connection], None]

THREAD = "chat-1"


class Review(TypedDict):
    score: float


def a_nan_is_refused(saver: BufferedPostgresSaver, conn: Connection) -> None:
    builder = StateGraph(Review)
    builder.add_node("review", lambda state: {"score": float("nan")})
    builder.add_edge(START, "review")
    builder.add_edge("review", END)
    with pytest.raises(NonFiniteValueError):
        builder.compile(checkpointer=saver).invoke({"score": 0.0}, config(THREAD))


def a_row_is_refused(saver: BufferedPostgresSaver, conn: Connection) -> None:
    forbid(conn)
    put_steps(saver, THREAD, 3, {1: "checkpoint"})
    assert not saver.flush()


def the_sensor_is_mended(saver: BufferedPostgresSaver, conn: Connection) -> None:
    assert saver.dead_letters.list() == []


def the_row_is_allowed(saver: BufferedPostgresSaver, conn: Connection) -> None:
    allow(conn)
    assert [letter.resolution for letter in saver.dead_letters.replay()] == ["replayed"]
    assert saver.flush()


@pytest.fixture
def saver(api_uri: str, redis_url: str, prefix: str, spool_dir: Path) -> Iterator[BufferedPostgresSaver]:
    with BufferedPostgresSaver.from_conn_string(
        api_uri, redis_url=redis_url, prefix=prefix, non_finite="raise", triggers=NOTHING
    ) as made:
        yield made


@pytest.mark.parametrize(
    ("happens", "is_mended", "error_type"),
    [
        (a_nan_is_refused, the_sensor_is_mended, "checkpoint_refused"),
        (a_row_is_refused, the_row_is_allowed, "checkpoint_dead_letter"),
    ],
)
def test_the_whole_story(
    happens: Happening,
    is_mended: Happening,
    error_type: str,
    saver: BufferedPostgresSaver,
    served: Served,
    token: Callable[..., str],
    conn: Connection,
    caplog: pytest.LogCaptureFixture,
) -> None:
    admin = token("read", "read_sensitive", "resolve", name="ann")
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(
            httpx.Client(base_url=served.url, headers={"Authorization": f"Bearer {admin}"}, timeout=60)
        )
        browser = connected(stack.enter_context(served.lines(f"/threads/{THREAD}/events")))
        desk = connected(stack.enter_context(served.lines("/admin/system-errors/events")))

        def of(path: str, **query: Any) -> dict[str, Any]:
            answer = client.get(f"/admin/system-errors{path}", params=query)
            assert answer.status_code == 200, answer.text
            found: dict[str, Any] = answer.json()
            return found

        with caplog.at_level(logging.INFO, logger="checkpointer"):
            happens(saver, conn)
            assert saver.hooks.flush(30)

        # The console has said it.
        told = [record.getMessage() for record in caplog.records if record.levelno == logging.CRITICAL]
        assert any(f"type={error_type} thread={THREAD}" in line for line in told)

        # The user is told from which step on the conversation is not saved.
        notice = next(
            frame["data"] for frame in iter(lambda: event(browser), None) if frame["data"]["severity"] == "critical"
        )
        assert notice["thread_id"] == THREAD
        assert notice["message"]

        # An administrator sees it arrive, and finds it by its severity.
        arrived = next(
            frame["data"] for frame in iter(lambda: event(desk), None) if frame["data"]["error_type"] == error_type
        )
        found = of("", severity="critical", error_type=error_type)["errors"]
        assert arrived["id"] in [error["id"] for error in found]
        error = of(f"/{arrived['id']}")["error"]
        assert (error["thread_id"], error["severity"], error["resolved_at"]) == (THREAD, "critical", None)
        fingerprint = error["fingerprint"]

        # Resolved, with notes: who, when and how are kept.
        before = datetime.now(UTC) - timedelta(seconds=5)
        for each in found:
            answer = client.post(
                f"/admin/system-errors/{each['id']}/resolve", json={"resolution_notes": "Mended at the source."}
            )
            assert answer.status_code == 200, answer.text
        error = of(f"/{arrived['id']}")["error"]
        assert (error["resolved_by"], error["resolution_notes"]) == ("ann", "Mended at the source.")
        assert before < datetime.fromisoformat(error["resolved_at"]) < datetime.now(UTC) + timedelta(seconds=5)
        assert of("", severity="critical", error_type=error_type)["errors"] == []
        assert of(f"/groups/{fingerprint}")["group"]["status"] == "resolved"

        is_mended(saver, conn)

        # It happens again: the group has regressed, and that too is told.
        happens(saver, conn)
        assert saver.hooks.flush(30)
        wait_until(lambda: of(f"/groups/{fingerprint}")["group"]["status"] == "regressed")
        group = of(f"/groups/{fingerprint}")["group"]
        assert (group["regressions"], group["resolved_by"]) == (1, "ann")
        again = of("", fingerprint=fingerprint)["errors"]
        assert again
        assert all(error["id"] > arrived["id"] and error["resolved_at"] is None for error in again)
