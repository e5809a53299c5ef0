"""A thread's log keeps its lines, also those of an outage, and shows them live."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from helpers import wait_until

import observability
from checkpointer.errors import StoreUnavailableError
from observability.links import AwayError

if TYPE_CHECKING:
    from checkpointer.embedded import Servers
    from checkpointer.hooks import HookContext
    from observability import Observability


def test_lines_are_kept_by_thread_in_order(target: Observability) -> None:
    for n in range(5):
        observability.emit_log(f"line {n}", thread_id="t", level="warning", observability=target)
    observability.emit_log("other", thread_id="u", observability=target)
    assert target.flush(10)
    lines = observability.read_thread_log("t", 3, observability=target)
    assert [line["message"] for line in lines] == ["line 2", "line 3", "line 4"]
    assert {line["level"] for line in lines} == {"warning"}
    assert [line["level"] for line in observability.read_thread_log("u", observability=target)] == ["info"]


async def test_the_async_reader_answers_the_same(target: Observability) -> None:
    observability.emit_log("line", thread_id="t", observability=target)
    assert target.flush(10)
    lines = await observability.aread_thread_log("t", observability=target)
    assert lines == observability.read_thread_log("t", observability=target)
    assert len(lines) == 1


def test_the_tail_is_bounded_and_expires(context: HookContext, target: Observability) -> None:
    for n in range(300):
        observability.emit_log(f"line {n}", thread_id="t", observability=target)
    assert target.flush(30)
    key = f"{context.prefix}:ev:log:t"
    with context.connect_redis() as client:
        assert client.xlen(key) == 256
        assert 0 < client.ttl(key) <= 600
        last = client.xrevrange(key, count=1)[0][1]
    assert json.loads(last[b"line"])["message"] == "line 299"


def test_lines_of_an_outage_arrive_and_can_be_read_during_it(own_servers: Servers, own_target: Observability) -> None:
    observability.emit_log("before", thread_id="t", observability=own_target)
    assert own_target.flush(10)
    own_servers.postgres.kill()
    observability.emit_log("during", thread_id="t", observability=own_target)
    assert own_target.flush(15)
    during = observability.read_thread_log("t", observability=own_target)
    assert [line["message"] for line in during] == ["before", "during"]
    own_servers.postgres.start()
    after = wait_until(lambda: len(_kept(own_target)) == 2 and _kept(own_target))
    assert [message for (message,) in after] == ["before", "during"]
    assert observability.read_thread_log("t", observability=own_target) == during


def _kept(target: Observability) -> list[tuple[str]]:
    try:
        return target.log._postgres.run(
            lambda connection: connection.execute("SELECT message FROM thread_logs ORDER BY id").fetchall()
        )
    except AwayError:
        return []


def test_with_both_servers_away_reading_raises_instead_of_answering_nothing(
    own_servers: Servers, own_target: Observability
) -> None:
    own_servers.postgres.kill()
    own_servers.valkey.kill()
    with pytest.raises(StoreUnavailableError):
        observability.read_thread_log("t", observability=own_target)
