"""What each operation costs, counted on the wire."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.postgres import PostgresSaver
from proxy import Proxy, proxied

from checkpointer import BufferedPostgresSaver
from checkpointer.buffer import scripts
from checkpointer.run_streams import RUNTIME

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass
class Wired:
    saver: BufferedPostgresSaver
    redis: Proxy
    postgres: Proxy

    def cost(self, operation: Callable[[], Any]) -> tuple[int, int]:
        """Return the round trips to Redis and to Postgres."""
        before = (self.redis.turns, self.postgres.turns)
        operation()
        return self.redis.turns - before[0], self.postgres.turns - before[1]

    async def acost(self, operation: Callable[[], Any]) -> tuple[int, int]:
        before = (self.redis.turns, self.postgres.turns)
        await operation()
        return self.redis.turns - before[0], self.postgres.turns - before[1]


@pytest.fixture
def wired(postgres_uri: str, redis_url: str, prefix: str) -> Iterator[Wired]:
    with ExitStack() as stack:
        uri, postgres = stack.enter_context(proxied(postgres_uri))
        url, buffer = stack.enter_context(proxied(redis_url))
        saver = BufferedPostgresSaver.from_conn_string(
            uri, redis_url=url, prefix=prefix, hooks=(), triggers=frozenset(), pool_size=1
        )
        saver.setup()
        yield Wired(saver, buffer, postgres)
        saver.close()


def thread(checkpoint_id: str | None = None) -> Any:
    found = {"thread_id": "t", "checkpoint_ns": ""}
    return {"configurable": {**found, **({"checkpoint_id": checkpoint_id} if checkpoint_id else {})}}


def checkpoint(step: int, changed: tuple[str, ...] = ("messages",)) -> tuple[Any, Any, dict[str, str]]:
    channels = ("messages", "plan", "files")
    versions = {channel: f"{step if channel in changed else 0:032}.5" for channel in channels}
    found = {
        "v": 4,
        "id": str(uuid6(clock_seq=step)),
        "ts": "2026-01-01T00:00:00+00:00",
        "channel_values": {channel: [channel] * 50 for channel in channels},
        "channel_versions": versions,
        "versions_seen": {},
        "updated_channels": list(changed),
    }
    return found, {"source": "loop", "step": step, "parents": {}}, {c: versions[c] for c in changed}


def test_the_operations_of_a_hot_thread_cost_one_round_trip_each(wired: Wired) -> None:
    saver = wired.saver
    first, metadata, _ = checkpoint(0)
    # Opens the connections and prepares the statements.
    saver.put(thread(), first, metadata, first["channel_versions"])
    saver.put_writes(thread(first["id"]), [("messages", ["x"])], "task-0")
    saver.get_tuple(thread())

    second, metadata, new = checkpoint(1)
    assert wired.cost(lambda: saver.put(thread(first["id"]), second, metadata, new)) == (1, 0)
    assert wired.cost(lambda: saver.put_writes(thread(second["id"]), [("messages", ["x"]), ("plan", 1)], "t")) == (1, 0)
    # One verify query beside it, in a transaction of its own.
    assert wired.cost(lambda: saver.get_tuple(thread())) == (1, 1)
    saver.flush()
    assert wired.cost(lambda: saver.get_tuple(thread())) == (1, 1), "the flushed head is served from the read cache"
    third, metadata, new = checkpoint(2)
    assert wired.cost(lambda: saver.put(thread(second["id"]), third, metadata, new)) == (1, 0)


async def test_the_asynchronous_operations_cost_the_same(wired: Wired) -> None:
    saver = wired.saver
    first, metadata, _ = checkpoint(0)
    await saver.aput(thread(), first, metadata, first["channel_versions"])
    await saver.aput_writes(thread(first["id"]), [("messages", ["x"])], "task-0")
    await saver.aget_tuple(thread())

    second, metadata, new = checkpoint(1)
    assert await wired.acost(lambda: saver.aput(thread(first["id"]), second, metadata, new)) == (1, 0)
    assert await wired.acost(lambda: saver.aput_writes(thread(second["id"]), [("messages", ["x"])], "t")) == (1, 0)
    assert await wired.acost(lambda: saver.aget_tuple(thread())) == (1, 1)
    await saver.aclose()


def test_without_verifying_a_hot_read_asks_redis_alone(postgres_uri: str, redis_url: str, prefix: str) -> None:
    with (
        proxied(postgres_uri) as (uri, postgres),
        proxied(redis_url) as (url, buffer),
        BufferedPostgresSaver.from_conn_string(
            uri, redis_url=url, prefix=prefix, hooks=(), triggers=frozenset(), verify_reads=False
        ) as saver,
    ):
        saver.setup()
        first, metadata, _ = checkpoint(0)
        saver.put(thread(), first, metadata, first["channel_versions"])
        saver.get_tuple(thread())
        assert Wired(saver, buffer, postgres).cost(lambda: saver.get_tuple(thread())) == (1, 0)


def test_a_cold_read_asks_postgres_alone(wired: Wired, postgres_uri: str) -> None:
    """Of a thread that is not open in the buffer Postgres has all."""
    first = put_by_stock(postgres_uri)
    for _ in range(2):  # connects, and prepares the statement
        wired.saver.get_tuple(thread())
    assert wired.cost(lambda: wired.saver.get_tuple(thread())) == (0, 1)
    found = wired.saver.get_tuple(thread())
    assert found is not None
    assert found.checkpoint["id"] == first["id"]


async def test_a_runs_first_read_of_a_cold_thread_opens_it_in_the_same_round_trip(
    wired: Wired, postgres_uri: str
) -> None:
    saver = wired.saver

    def in_a_run(name: str) -> Any:
        return {"configurable": {"thread_id": name, "checkpoint_ns": "", RUNTIME: None}}

    # The other thread connects, prepares the statement, and shows the scripts to the server.
    for name in ("other", "t"):
        first = put_by_stock(postgres_uri, name)
        cost = await wired.acost(lambda: saver.aget_tuple(in_a_run(name)))  # noqa: B023 - called at once
        assert cost == (0, 1) or name == "other"
        second, metadata, new = checkpoint(1)
        parent = {"configurable": {"thread_id": name, "checkpoint_ns": "", "checkpoint_id": first["id"]}}
        cost = await wired.acost(lambda: saver.aput(parent, second, metadata, new))  # noqa: B023 - called at once
        assert cost == (2, 0) or name == "other", "it is open; what has not changed is sent once more"
        cost = await wired.acost(lambda: saver.aget_tuple(in_a_run(name)))  # noqa: B023 - called at once
        assert cost == (1, 1) or name == "other", "Redis has all of it"
    third, metadata, new = checkpoint(2)
    assert await wired.acost(lambda: saver.aput(thread(second["id"]), third, metadata, new)) == (1, 0)
    await saver.aclose()


def test_a_read_of_a_thread_that_is_open_elsewhere_asks_both(
    wired: Wired, postgres_uri: str, redis_url: str, prefix: str
) -> None:
    with BufferedPostgresSaver.from_conn_string(
        postgres_uri, redis_url=redis_url, prefix=prefix, hooks=(), triggers=frozenset()
    ) as other:
        first, metadata, _ = checkpoint(0)
        other.put(thread(), first, metadata, first["channel_versions"])
        for _ in range(2):
            wired.saver.get_tuple(thread())
        # Postgres says that Redis has more, and is asked what it has of what Redis says.
        assert wired.cost(lambda: wired.saver.get_tuple(thread())) == (1, 2)
        other.flush()
        assert wired.cost(lambda: wired.saver.get_tuple(thread())) == (1, 1)


def put_by_stock(uri: str, name: str = "t") -> Any:
    first, metadata, _ = checkpoint(0)
    config: Any = {"configurable": {"thread_id": name, "checkpoint_ns": ""}}
    with PostgresSaver.from_conn_string(uri) as stock:
        stock.put(config, first, metadata, first["channel_versions"])
    return first


def test_listing_a_thread_that_is_flushed_costs_one_round_trip_to_each(wired: Wired) -> None:
    saver = wired.saver
    first, metadata, _ = checkpoint(0)
    saver.put(thread(), first, metadata, first["channel_versions"])
    for _ in range(7):  # the first one flushes, and the statement is prepared in the end
        assert len(list(saver.list(thread(), limit=10))) == 1
    assert wired.cost(lambda: list(saver.list(thread(), limit=10))) == (1, 1)


def test_the_first_put_on_a_cold_thread_sends_the_unchanged_channels_once(wired: Wired) -> None:
    saver = wired.saver
    first, metadata, _ = checkpoint(0)
    saver.put(thread(), first, metadata, first["channel_versions"])
    saver.flush()
    keys = saver._core.commands.layout.thread("t")
    client = saver._core.redis.client()
    client.script_load(scripts.FILL.source)  # a server learns a script once
    client.delete(keys.clean, keys.writes)
    second, metadata, new = checkpoint(1)
    assert wired.cost(lambda: saver.put(thread(first["id"]), second, metadata, new)) == (2, 0)
    third, metadata, new = checkpoint(2)
    assert wired.cost(lambda: saver.put(thread(second["id"]), third, metadata, new)) == (1, 0)
    saver.get_tuple(thread())
    assert wired.cost(lambda: saver.get_tuple(thread())) == (1, 1)


def test_a_put_sends_only_what_changed(wired: Wired) -> None:
    saver = wired.saver
    big, metadata, _ = checkpoint(0)
    big["channel_values"]["files"] = ["x" * 1000] * 1000
    saver.put(thread(), big, metadata, big["channel_versions"])
    sent = saver._core.commands.put
    sizes: list[int] = []

    def measuring(*args: Any) -> Any:
        call = sent(*args)
        sizes.append(sum(len(str(a)) if isinstance(a, int) else len(a) for a in call.args))
        return call

    saver._core.commands.put = measuring
    small, metadata, new = checkpoint(1, ("plan",))
    small["channel_values"]["files"] = big["channel_values"]["files"]
    saver.put(thread(big["id"]), small, metadata, new)
    assert sizes[0] < 5_000


def test_a_flush_of_one_thread_costs_a_handful_of_round_trips_whatever_its_size(wired: Wired) -> None:
    saver = wired.saver

    def put_some(count: int, start: int) -> None:
        parent = None
        for step in range(start, start + count):
            found, metadata, new = checkpoint(step)
            saver.put(thread(parent), found, metadata, new)
            parent = found["id"]

    put_some(2, 0)
    saver.flush("t")
    put_some(2, 10)
    few = wired.cost(lambda: saver.flush("t"))
    put_some(60, 20)
    many = wired.cost(lambda: saver.flush("t"))
    assert few[0] == many[0] == 2, "one to read, one to acknowledge"
    assert many[1] <= few[1] <= 12


def test_a_batch_of_many_threads_costs_no_more_statements_than_one_of_a_single_thread(wired: Wired) -> None:
    saver = wired.saver
    session: Any = saver._core.flusher._session
    ask, asked = session._ask, []

    # On the wire a pipeline of many calls may look like several turns: the first ones are answered before the last go.
    def noting(*args: Any, **kwargs: Any) -> Any:
        asked.append(args)
        return ask(*args, **kwargs)

    session._ask = noting

    def cost_of(threads: int, steps: int) -> tuple[int, int]:
        for _ in range(threads):
            config: Any = {"configurable": {"thread_id": str(uuid4()), "checkpoint_ns": ""}}
            for step in range(steps):
                found, metadata, new = checkpoint(step)
                config = saver.put(config, found, metadata, new)
                saver.put_writes(config, [("messages", ["x"])], "task")
        asked.clear()
        _, postgres = wired.cost(saver.flush)
        return len(asked), postgres

    for steps in (1, 2) * 5:
        cost_of(1, steps)  # prepares the statements
    single = cost_of(1, 2)
    assert single == (3, 7)  # to look for what is dirty, to read it, to forget it
    assert cost_of(4, 1) == single
    # Beyond four threads one more read; beyond 100 rows COPY, a turn more for each of the three tables.
    assert cost_of(50, 4) == cost_of(50, 10) == (4, 10)
