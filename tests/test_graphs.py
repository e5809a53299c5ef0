"""The same graphs under LangGraph's own savers and under ours: equal results, states, histories and rows."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import redis
from graphs import (
    MARKER,
    SCENARIOS,
    Call,
    Point,
    Run,
    Scenario,
    assert_equal,
    build_chain,
    build_everything,
    database_with_tables,
    exactly,
    make_calls,
    make_calls_async,
    plain,
    sorted_interrupts,
)
from langgraph._internal import _serde
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.serde import _msgpack
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from psycopg.rows import dict_row

from checkpointer import BufferedPostgresSaver
from checkpointer.errors import ClosedError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from conftest import Addresses
    from langchain_core.runnables import RunnableConfig
    from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple
    from langgraph.checkpoint.serde.base import SerializerProtocol

    from checkpointer import CheckpointEvent

NEVER: dict[str, Any] = {"triggers": frozenset()}
RACING: dict[str, Any] = {"flush_size": 1, "flush_age": 0.01}


class Recorded(BufferedPostgresSaver):
    """Remembers what was put, so that it can be read without the flush that a list makes."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.saved: dict[tuple[str, str], RunnableConfig] = {}
        self.events: list[CheckpointEvent] = []
        self.hooks.add(self.events.append)

    def _record(self, saved: RunnableConfig) -> RunnableConfig:
        configurable = saved["configurable"]
        self.saved[configurable["checkpoint_ns"], configurable["checkpoint_id"]] = saved
        return saved

    def put(self, *args: Any, **named: Any) -> RunnableConfig:
        return self._record(super().put(*args, **named))

    async def aput(self, *args: Any, **named: Any) -> RunnableConfig:
        return self._record(await super().aput(*args, **named))


@dataclass
class Evidence:
    """What was seen of one thread.

    Attributes:
        outcomes: What every call of the script returned, then the final state and the histories.
        reads: All checkpoints, each by its id and each namespace's latest: first as the script left them, then flushed.
    """

    outcomes: list[Any] = field(default_factory=list)
    reads: list[list[CheckpointTuple | None]] = field(default_factory=list)


def observed(
    scenario: Scenario, run: Run, saver: BaseCheckpointSaver[Any], evidence: Evidence
) -> Generator[Call, Any, None]:
    """Yield all calls to make with one saver, and take down the results."""
    script = scenario.script(run)
    result = None
    while True:
        try:
            call = script.send(result)
        except StopIteration:
            break
        result = yield call
        evidence.outcomes.append((call.method, sorted_interrupts(result)))
    if isinstance(saver, Recorded):
        yield from read_all(saver, evidence)
        assert (yield Call(saver, "flush", (), {}))
        yield from read_all(saver, evidence)
    evidence.outcomes.append(("get_state", (yield run.state())))
    for ns in scenario.namespaces:
        config = {"configurable": {**run.config["configurable"], "checkpoint_ns": ns}}
        history = yield run.history(config)
        assert history
        evidence.outcomes.append(("get_state_history", history))


def read_all(saver: Recorded, evidence: Evidence) -> Generator[Call, Any, None]:
    found = []
    for config in list(saver.saved.values()):
        found.append((yield Call(saver, "get_tuple", (config,), {})))
    for config in latest_configs(saver):
        found.append((yield Call(saver, "get_tuple", (config,), {})))
    evidence.reads.append(found)


def latest_configs(saver: Recorded) -> list[RunnableConfig]:
    configs = {}
    for (ns, _), config in sorted(saver.saved.items()):
        configs[ns] = {"configurable": {**config["configurable"], "checkpoint_id": None}}
    return list(configs.values())


@dataclass(frozen=True)
class Place:
    """Where a test's savers work, and on which threads."""

    postgres_uri: str
    redis_url: str
    prefix: str
    stock_thread: str
    our_thread: str

    def stock(self, scenario: Scenario, api: str, durability: str, serde: SerializerProtocol | None = None) -> Evidence:
        """Run a scenario under LangGraph's own saver."""
        evidence = Evidence()
        if api == "sync":
            with psycopg.connect(self.postgres_uri, autocommit=True, row_factory=dict_row) as conn:
                saver = PostgresSaver(conn, serde=serde)
                run = Run(scenario.build(saver), self.stock_thread, durability)
                make_calls(observed(scenario, run, saver, evidence))
            return evidence

        async def main() -> None:
            async with AsyncPostgresSaver.from_conn_string(self.postgres_uri, serde=serde) as saver:
                run = Run(scenario.build(saver), self.stock_thread, durability)
                await make_calls_async(observed(scenario, run, saver, evidence))

        asyncio.run(main())
        return evidence

    def ours(
        self,
        scenario: Scenario,
        api: str,
        durability: str,
        serde: SerializerProtocol | None = None,
        while_open: Callable[[Recorded], None] | None = None,
        **settings: Any,
    ) -> tuple[Evidence, Recorded]:
        """Run a scenario under our saver; `while_open` is called between its last call and the first flush."""
        evidence = Evidence()
        made = Recorded.from_conn_string(
            self.postgres_uri, redis_url=self.redis_url, prefix=self.prefix, hooks=(), serde=serde, **settings
        )
        assert isinstance(made, Recorded)

        def steps(saver: Recorded) -> Generator[Call, Any, None]:
            run = Run(scenario.build(saver), self.our_thread, durability)
            for call in (inner := observed(scenario, run, saver, evidence)):
                while True:
                    if call.method == "flush" and while_open is not None:
                        while_open(saver)
                    try:
                        call = inner.send((yield call))
                    except StopIteration:
                        return

        if api == "sync":
            with made as saver:
                make_calls(steps(saver))
            return evidence, made

        async def main() -> None:
            async with made as saver:
                await make_calls_async(steps(saver))

        asyncio.run(main())
        return evidence, made

    def stock_reads(self, saver: Recorded, serde: SerializerProtocol | None = None) -> list[CheckpointTuple | None]:
        """Read with LangGraph's own saver what our saver read, in the same order."""
        with psycopg.connect(self.postgres_uri, autocommit=True, row_factory=dict_row) as conn:
            stock = PostgresSaver(conn, serde=serde)
            return [stock.get_tuple(config) for config in (*saver.saved.values(), *latest_configs(saver))]

    def rows(self, thread_id: str, serde: SerializerProtocol | None = None) -> list[CheckpointTuple]:
        """Read all of a thread with LangGraph's own saver."""
        with psycopg.connect(self.postgres_uri, autocommit=True, row_factory=dict_row) as conn:
            return list(PostgresSaver(conn, serde=serde).list({"configurable": {"thread_id": thread_id}}))


@pytest.fixture(scope="module")
def database(servers: Addresses) -> Iterator[str]:
    """A database for all tests here: each has threads and a prefix of its own."""
    with database_with_tables(servers.postgres_uri, servers.redis_url) as uri:
        yield uri


@pytest.fixture
def place(database: str, redis_url: str, prefix: str) -> Place:
    return Place(database, redis_url, prefix, f"stock-{prefix}", f"ours-{prefix}")


def by_namespace(rows: list[CheckpointTuple]) -> list[CheckpointTuple]:
    """Order rows so that subgraphs that ran at the same time do not mix."""
    oldest: dict[str, str] = {}
    for row in rows:
        oldest[row.config["configurable"]["checkpoint_ns"]] = row.config["configurable"]["checkpoint_id"]
    return sorted(rows, key=lambda row: oldest[row.config["configurable"]["checkpoint_ns"]])


def assert_same(place: Place, ours: Evidence, stock: Evidence) -> None:
    assert [method for method, _ in ours.outcomes] == [method for method, _ in stock.outcomes]
    mine, theirs = plain(ours.outcomes, place.our_thread), plain(stock.outcomes, place.stock_thread)
    assert_equal(mine, theirs)


def assert_rows_agree(place: Place, ours: Evidence, saver: Recorded, serde: SerializerProtocol | None = None) -> None:
    buffered, flushed = map(exactly, ours.reads)
    stored = exactly(place.stock_reads(saver, serde))
    assert None not in stored[1]
    assert_equal(buffered, stored)
    assert_equal(flushed, stored)
    rows = place.rows(place.our_thread, serde)
    ids = {(r.config["configurable"]["checkpoint_ns"], r.config["configurable"]["checkpoint_id"]) for r in rows}
    assert ids == set(saver.saved)
    # And the tables hold what they would if LangGraph's own saver had run the graph.
    assert_equal(
        plain(by_namespace(rows), place.our_thread),
        plain(by_namespace(place.rows(place.stock_thread, serde)), place.stock_thread),
    )


@pytest.mark.parametrize(
    ("durability", "flushing"),
    [("sync", NEVER), ("async", NEVER), ("exit", NEVER), ("async", RACING)],
    ids=["sync", "async", "exit", "racing"],
)
@pytest.mark.parametrize("api", ["sync", "async"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_graph_does_the_same_as_under_the_stock_saver(
    name: str, flushing: dict[str, Any], api: str, durability: str, place: Place
) -> None:
    scenario = SCENARIOS[name]
    stock = place.stock(scenario, api, durability)
    ours, saver = place.ours(scenario, api, durability, **flushing)
    assert_same(place, ours, stock)
    assert_rows_agree(place, ours, saver)


# -- nothing in plain text ---------------------------------------------------------------------------------------


def in_redis(place: Place) -> dict[str, list[bytes]]:
    """Return all that the buffer holds for this test: by kind of record, and under "" what is none."""
    found: dict[str, list[bytes]] = {"c": [], "b": [], "w": [], "": []}
    with redis.Redis.from_url(place.redis_url) as client:
        for key in client.scan_iter(f"{place.prefix}:*", count=1000):
            found[""].append(key)
            kind = client.type(key)
            if kind == b"hash":
                for name, value in client.hgetall(key).items():
                    record = name[:1].decode() if name[1:2] == b"\0" and name[:1] in (b"c", b"b", b"w") else ""
                    found[record].append(value)
                    found[""].append(name)
            elif kind == b"zset":
                found[""] += client.zrange(key, 0, -1)
            else:
                found[""].append(client.get(key))
    return found


def in_postgres(place: Place) -> dict[str, list[bytes]]:
    """Return all that LangGraph's tables hold of our thread."""
    with psycopg.connect(place.postgres_uri) as conn:
        return {
            table: [
                row.encode() if isinstance(row, str) else row or b""
                for (row,) in conn.execute(f"SELECT {column} FROM {table} WHERE thread_id = %s", (place.our_thread,))
            ]
            for table, column in (
                ("checkpoints", "checkpoint::text || metadata::text"),
                ("checkpoint_blobs", "blob"),
                ("checkpoint_writes", "blob"),
            )
        }


def holding_marker(found: dict[str, list[bytes]]) -> set[str]:
    return {kind for kind, values in found.items() if any(MARKER.encode() in value for value in values)}


@pytest.mark.parametrize("api", ["sync", "async"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_an_encrypted_state_is_nowhere_in_plain_text(
    name: str, api: str, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    serde = EncryptedSerializer.from_pycryptodome_aes(key=b"0123456789abcdef")
    scenario = SCENARIOS[name]
    buffered: list[dict[str, list[bytes]]] = []
    ours, saver = place.ours(
        scenario, api, "async", serde, while_open=lambda _: buffered.append(in_redis(place)), **NEVER
    )
    assert MARKER in repr(ours.outcomes)
    assert all(buffered[0].values()), "there was nothing to search"
    assert not holding_marker(buffered[0])
    stored = in_postgres(place)
    assert all(stored.values()), "there was nothing to search"
    assert not holding_marker(stored)
    assert not holding_marker(in_redis(place))
    logged = [r.getMessage() for r in caplog.records if r.name.startswith(("checkpointer", "observability"))]
    assert MARKER not in repr((saver.events, logged))
    # Nor is anything lost by it.
    assert_same(place, ours, place.stock(scenario, api, "async"))
    assert_rows_agree(place, ours, saver, serde)


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_search_for_plain_text_finds_it_without_encryption(name: str, place: Place) -> None:
    buffered: list[dict[str, list[bytes]]] = []
    place.ours(SCENARIOS[name], "sync", "sync", while_open=lambda _: buffered.append(in_redis(place)), **NEVER)
    assert {"b", "w"} >= holding_marker(buffered[0]) > set()
    assert {"checkpoint_blobs", "checkpoint_writes"} >= holding_marker(in_postgres(place)) > set()


# -- strict deserialisation --------------------------------------------------------------------------------------


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> JsonPlusSerializer:
    """What LANGGRAPH_STRICT_MSGPACK=true does: graphs clone their saver, to allow the types of their schemas."""
    for module in (_msgpack, _serde):
        monkeypatch.setattr(module, "STRICT_MSGPACK_ENABLED", True)
    return JsonPlusSerializer()


@pytest.mark.parametrize("api", ["sync", "async"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_graph_does_the_same_with_strict_msgpack(
    name: str, api: str, place: Place, strict: JsonPlusSerializer
) -> None:
    scenario = SCENARIOS[name]
    stock = place.stock(scenario, api, "async", strict)
    ours, saver = place.ours(scenario, api, "async", strict, **NEVER)
    assert_same(place, ours, stock)
    assert_rows_agree(place, ours, saver, strict)


def test_strict_msgpack_decodes_a_schemas_types_through_the_clone_and_not_through_the_saver(
    place: Place, strict: JsonPlusSerializer
) -> None:
    with BufferedPostgresSaver.from_conn_string(
        place.postgres_uri, redis_url=place.redis_url, prefix=place.prefix, hooks=(), serde=strict, **NEVER
    ) as saver:
        graph = build_everything(saver)
        assert graph.checkpointer is not saver
        config = {"configurable": {"thread_id": place.our_thread}}
        graph.invoke({"mixed": []}, config)
        for _ in ("buffered", "flushed"):
            assert isinstance(graph.get_state(config).values["point"], Point)
            found = saver.get_tuple(config)
            assert found is not None
            assert not isinstance(found.checkpoint["channel_values"]["point"], Point)
            assert saver.flush()


def test_a_clone_shares_the_flusher_and_is_closed_with_the_saver(place: Place) -> None:
    strict = JsonPlusSerializer(allowed_msgpack_modules=[("graphs", "Model")])
    config = {"configurable": {"thread_id": place.our_thread}}
    for closed_first in (0, 1):
        saver = Recorded.from_conn_string(
            place.postgres_uri, redis_url=place.redis_url, prefix=place.prefix, hooks=(), serde=strict, **NEVER
        )
        saver.get_tuple(config)
        assert saver.flush()
        threads = threading.active_count()
        clone = saver.with_allowlist([("graphs", "Point")])
        assert clone is not saver
        assert isinstance(clone, BufferedPostgresSaver)
        build_chain(clone).invoke({"notes": [MARKER]}, config)
        report = saver.flush()
        assert report
        assert report.checkpoints > 0
        assert clone.hooks is saver.hooks
        assert threading.active_count() == threads
        (saver, clone)[closed_first].close()
        for either in (saver, clone):
            with pytest.raises(ClosedError):
                either.get_tuple(config)
