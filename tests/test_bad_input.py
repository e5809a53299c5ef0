"""Bad input gets a typed error that says what to do, before anything is written."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import psycopg
import pytest
import redis
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.base.id import uuid6
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from checkpointer import (
    BufferedPostgresSaver,
    BufferOptions,
    BufferUnavailableError,
    ClosedError,
    ConfigurationError,
    InvalidConfigError,
    NonFiniteValueError,
    NotSetUpError,
    StoreUnavailableError,
    UnserializableValueError,
    UnsupportedServerError,
    WrongLoopError,
)
from checkpointer.checks import BufferFacts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from checkpointer import CheckpointEvent

OPTIONS: Any = {"hooks": (), "triggers": frozenset()}
NOWHERE = "postgresql://postgres@127.0.0.1:1/none"


@pytest.fixture
def saver(postgres_uri: str, redis_url: str, prefix: str) -> Iterator[BufferedPostgresSaver]:
    with BufferedPostgresSaver.from_conn_string(postgres_uri, redis_url=redis_url, prefix=prefix, **OPTIONS) as found:
        found.setup()
        yield found


def checkpoint(**values: Any) -> Any:
    return {
        "v": 4,
        "id": str(uuid6()),
        "ts": "2026-01-01T00:00:00+00:00",
        "channel_values": values,
        "channel_versions": dict.fromkeys(values, "1"),
        "versions_seen": {},
        "updated_channels": None,
    }


def config(**configurable: Any) -> Any:
    return {"configurable": {"thread_id": "t", "checkpoint_ns": "", **configurable}}


def written(saver: BufferedPostgresSaver) -> int:
    """How many keys of threads Redis has."""
    return len(list(saver._core.redis.client().scan_iter(f"{saver.options.prefix}:*")))


@pytest.mark.parametrize("uri", ["", "not a uri", "http://x", "postgresql://h/db?nonsense=1"])
def test_a_connection_string_that_cannot_be_one_is_refused(uri: str, redis_url: str) -> None:
    with pytest.raises(ConfigurationError, match="Postgres connection string"):
        BufferedPostgresSaver.from_conn_string(uri, redis_url=redis_url, **OPTIONS)


@pytest.mark.parametrize("url", ["", "localhost", "http://x", "redis://h:port"])
def test_a_redis_url_that_cannot_be_one_is_refused(url: str, postgres_uri: str) -> None:
    with pytest.raises(ConfigurationError, match="redis_url"):
        BufferedPostgresSaver.from_conn_string(postgres_uri, redis_url=url, **OPTIONS)


def test_unreachable_servers_are_named_by_setup(postgres_uri: str, redis_url: str, prefix: str) -> None:
    with (
        BufferedPostgresSaver.from_conn_string(NOWHERE, redis_url=redis_url, prefix=prefix, **OPTIONS) as saver,
        pytest.raises(StoreUnavailableError, match="Check the server and the connection string"),
    ):
        saver.setup()
    with (
        BufferedPostgresSaver.from_conn_string(
            postgres_uri, redis_url="redis://127.0.0.1:1", prefix=prefix, **OPTIONS
        ) as saver,
        pytest.raises(BufferUnavailableError, match="Check the server and redis_url"),
    ):
        saver.setup()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("prefix", "a:b"),
        ("prefix", ""),
        ("partitions", 0),
        ("partitions", 2.5),
        ("partitions", True),
        ("non_finite", "drop"),
        ("on_unverifiable", "guess"),
        ("verify_reads", "yes"),
        ("triggers", {"sometimes"}),
        ("triggers", "age"),
        ("flush_age", -1),
        ("flush_size", 0),
        ("batch_records", 0),
        ("clean_ttl", 0),
        ("redis_timeout", 0),
        ("postgres_timeout", "soon"),
        ("hooks", "console"),
        ("no_such_option", 1),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(option: str, value: Any, postgres_uri: str, redis_url: str) -> None:
    with pytest.raises(ConfigurationError, match=option):
        BufferedPostgresSaver.from_conn_string(postgres_uri, redis_url=redis_url, **{option: value})


def test_an_unknown_hook_is_refused_with_the_known_ones(postgres_uri: str, redis_url: str) -> None:
    with pytest.raises(ConfigurationError, match="system_errors"):
        BufferedPostgresSaver.from_conn_string(postgres_uri, redis_url=redis_url, hooks=("no_such_hook",))


def test_options_and_single_settings_do_not_mix(postgres_uri: str, redis_url: str) -> None:
    with pytest.raises(ConfigurationError, match="not both"):
        BufferedPostgresSaver(postgres_uri, redis_url, options=BufferOptions(), prefix="x")


def test_clients_of_the_wrong_kind_are_refused(postgres_uri: str, redis_url: str) -> None:
    with pytest.raises(ConfigurationError, match="decode_responses=False"):
        BufferedPostgresSaver(postgres_uri, redis.Redis.from_url(redis_url, decode_responses=True), **OPTIONS)
    with pytest.raises(ConfigurationError, match="redis must be"):
        BufferedPostgresSaver(postgres_uri, object(), **OPTIONS)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="conn must be"):
        BufferedPostgresSaver(object(), redis_url, **OPTIONS)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [{}, {"configurable": {}}, {"configurable": {"checkpoint_ns": ""}}])
def test_a_missing_thread_id_is_named(saver: BufferedPostgresSaver, bad: Any) -> None:
    for call in (
        lambda: saver.put(bad, checkpoint(), {}, {}),
        lambda: saver.put_writes(bad, [("a", 1)], "task"),
        lambda: saver.get_tuple(bad),
    ):
        with pytest.raises(InvalidConfigError, match="thread_id"):
            call()
    assert written(saver) == 0


def test_a_missing_namespace_or_checkpoint_id_is_named(saver: BufferedPostgresSaver) -> None:
    with pytest.raises(InvalidConfigError, match="checkpoint_ns"):
        saver.put({"configurable": {"thread_id": "t"}}, checkpoint(), {}, {})
    with pytest.raises(InvalidConfigError, match="checkpoint_id"):
        saver.put_writes(config(), [("a", 1)], "task")
    assert written(saver) == 0


@pytest.mark.parametrize("bad", ["a\0b", "a\ud800", 1.5, None, b"x"])
def test_an_id_that_postgres_cannot_store_is_refused(saver: BufferedPostgresSaver, bad: Any) -> None:
    calls = [lambda: saver.put(config(thread_id=bad), checkpoint(), {}, {})]
    if bad is not None:
        calls += [
            lambda: saver.put(config(checkpoint_ns=bad), checkpoint(), {}, {}),
            lambda: saver.put_writes(config(checkpoint_id="1"), [(bad, 1)], "task"),
            lambda: saver.put_writes(config(checkpoint_id="1"), [("a", 1)], bad),
        ]
    for call in calls:
        with pytest.raises(InvalidConfigError):
            call()
    assert written(saver) == 0


def test_ids_too_long_for_an_index_entry_are_refused(saver: BufferedPostgresSaver) -> None:
    with pytest.raises(InvalidConfigError, match="shorter ids"):
        saver.put(config(thread_id=os.urandom(2000).hex()), checkpoint(), {}, {})
    assert written(saver) == 0


class Opaque:
    __slots__ = ()


def test_a_value_that_cannot_be_serialised_is_named_by_its_path(saver: BufferedPostgresSaver) -> None:
    with pytest.raises(UnserializableValueError, match=r"channel_values\.plan\.steps\[1\]"):
        saver.put(config(), checkpoint(plan={"steps": [1, Opaque()]}), {}, {"plan": "1"})
    with pytest.raises(UnserializableValueError, match=r"writes\[0\]\.plan"):
        saver.put_writes(config(checkpoint_id="1"), [("plan", [Opaque()])], "task")
    with pytest.raises(UnserializableValueError, match="metadata"):
        saver.put(config(), checkpoint(), {"who": {"x": Opaque()}}, {})  # type: ignore[typeddict-unknown-key]
    assert written(saver) == 0


def test_non_finite_raise_refuses_the_put_and_names_the_path(postgres_uri: str, redis_url: str, prefix: str) -> None:
    with BufferedPostgresSaver.from_conn_string(
        postgres_uri, redis_url=redis_url, prefix=prefix, non_finite="raise", **OPTIONS
    ) as saver:
        saver.setup()
        for value in (float("nan"), [1.0, float("inf")]):
            with pytest.raises(NonFiniteValueError, match=r"channel_values\.score"):
                saver.put(config(), checkpoint(score=value), {}, {"score": "1"})
        assert written(saver) == 0


async def test_a_put_that_is_refused_for_a_value_is_an_event_that_has_the_place_and_not_the_value(
    saver: BufferedPostgresSaver,
) -> None:
    events: list[CheckpointEvent] = []
    saver.hooks.add(events.append)
    values = {"plan": {"key": "hunter2", "thing": Opaque()}}
    with pytest.raises(UnserializableValueError):
        saver.put(config(), checkpoint(**values), {"source": "loop", "step": 4}, {"plan": "1"})
    with pytest.raises(UnserializableValueError):
        await saver.aput(config(), checkpoint(**values), {}, {"plan": "1"})
    with pytest.raises(UnserializableValueError):
        saver.put_writes(config(checkpoint_id="1"), list(values.items()), "task")
    with pytest.raises(UnserializableValueError):
        await saver.aput_writes(config(checkpoint_id="1"), list(values.items()), "task")
    assert saver.hooks.flush(30)
    assert [(event.name, event.severity, event.operation, event.lost_from_step) for event in events] == [
        ("put.refused", "critical", "put", 4),
        ("put.refused", "critical", "put", None),
        ("put.refused", "critical", "put_writes", None),
        ("put.refused", "critical", "put_writes", None),
    ]
    assert "channel_values.plan.thing" in events[0].message
    assert events[0].user_notice
    assert "hunter2" not in str(events)


def test_what_no_table_can_hold_as_it_is_never_makes_a_flush_fail(saver: BufferedPostgresSaver) -> None:
    nasty = {
        "nul": "a\0b",
        "surrogate": "a\ud800b",
        "nan": float("nan"),
        "huge": 2**70,
        "deep": {"n": float("-inf"), "big": 2**65, "text": "x\0y"},
        "bytes": b"\x00\xff",
    }
    saved = saver.put(
        config(), checkpoint(**nasty), {"source": "loop", "step": 1, "note": {"x\0": [float("nan"), "\ud800"]}},
        dict.fromkeys(nasty, "1"),
    )  # fmt: skip
    saver.put_writes(saved, list(nasty.items()), "task")
    before = saver.get_tuple(config())
    assert saver.flush()
    assert before is not None
    values = before.checkpoint["channel_values"]
    assert values["nul"] == "a\0b"
    assert values["huge"] == 2**70
    assert values["deep"] == {"n": None, "big": 2**65, "text": "x\0y"}
    assert values["nan"] is None
    for key in saver._core.redis.client().scan_iter(f"{saver.options.prefix}:*"):
        saver._core.redis.client().delete(key)
    assert saver.get_tuple(config()) == before


def test_a_numpy_nan_beside_what_json_cannot_hold_is_sanitised(saver: BufferedPostgresSaver) -> None:
    value = {"score": np.float64("nan"), "pair": (1, 2), "message": HumanMessage("hi", id="1")}
    saver.put(config(), checkpoint(plan=value), {}, {"plan": "1"})
    found = saver.get_tuple(config())
    assert found is not None
    assert found.checkpoint["channel_values"]["plan"] == {**value, "score": None, "pair": [1, 2]}


def test_a_put_before_setup_is_refused_and_writes_nothing(postgres_uri: str, redis_url: str, prefix: str) -> None:
    with BufferedPostgresSaver.from_conn_string(postgres_uri, redis_url=redis_url, prefix=prefix, **OPTIONS) as saver:
        for call in (
            lambda: saver.put(config(), checkpoint(), {}, {}),
            lambda: saver.put_writes(config(checkpoint_id="1"), [("a", 1)], "task"),
            lambda: saver.get_tuple(config()),
            lambda: list(saver.list(config())),
        ):
            with pytest.raises(NotSetUpError, match="setup"):
                call()
        assert written(saver) == 0


async def test_an_old_server_is_refused(postgres_uri: str, redis_url: str, prefix: str) -> None:
    saver = BufferedPostgresSaver.from_conn_string(postgres_uri, redis_url=redis_url, prefix=prefix, **OPTIONS)
    saver._core.redis.ainfo = lambda: asyncio.sleep(0, BufferFacts([{"redis_version": "6.2.1"}]))
    with pytest.raises(UnsupportedServerError, match=r"Redis 6\.2\.1 is too old"):
        await saver.asetup()
    await saver.aclose()


def test_a_closed_saver_says_so_and_can_be_closed_again(saver: BufferedPostgresSaver) -> None:
    saver.close()
    saver.close()
    for call in (
        lambda: saver.put(config(), checkpoint(), {}, {}),
        lambda: saver.get_tuple(config()),
        saver.flush,
        saver.setup,
    ):
        with pytest.raises(ClosedError, match="open a new one"):
            call()


async def test_close_inside_the_loop_that_it_would_wait_for_is_refused(
    postgres_uri: str, redis_url: str, prefix: str
) -> None:
    saver = BufferedPostgresSaver.from_conn_string(postgres_uri, redis_url=redis_url, prefix=prefix, **OPTIONS)
    await saver.asetup()
    with pytest.raises(WrongLoopError, match="aclose"):
        saver.close()
    await saver.aget_tuple(config())
    await saver.aclose()
    await saver.aclose()


def test_own_pools_and_clients_serve_both_kinds_of_calls(postgres_uri: str, redis_url: str, prefix: str) -> None:
    with (
        ConnectionPool(postgres_uri, min_size=1, max_size=2, kwargs={"autocommit": True}, open=True) as pool,
        redis.Redis.from_url(redis_url) as client,
        BufferedPostgresSaver(pool, client, prefix=prefix, **OPTIONS) as saver,
    ):
        saver.setup()
        first = saver.put(config(), checkpoint(a=[1]), {}, {"a": "1"})

        async def more() -> Any:
            await saver.aput(config(checkpoint_id=first["configurable"]["checkpoint_id"]), checkpoint(a=[2]), {}, {})
            found = await saver.aget_tuple(config())
            await saver._core._aclose_loop()
            return found

        assert asyncio.run(more()) == saver.get_tuple(config())
    with pool.connection() if not pool.closed else psycopg.connect(postgres_uri) as conn:
        conn.execute("SELECT 1")


async def test_own_asynchronous_pool_and_client_are_left_open(postgres_uri: str, redis_url: str, prefix: str) -> None:
    async with AsyncConnectionPool(
        postgres_uri, min_size=1, max_size=2, kwargs={"autocommit": True}, open=False
    ) as pool:
        client = redis.asyncio.Redis.from_url(redis_url)
        async with BufferedPostgresSaver(pool, client, prefix=prefix, **OPTIONS) as saver:
            await saver.asetup()
            await saver.aput(config(), checkpoint(a=[1]), {}, {"a": "1"})
            assert await saver.aflush()
            assert await saver.aget_tuple(config()) is not None
        async with pool.connection() as conn:
            await conn.execute("SELECT 1")
        assert await client.ping()
        await client.aclose()


def test_one_saver_serves_several_event_loops_one_after_the_other(saver: BufferedPostgresSaver) -> None:
    for number in range(3):
        asyncio.run(saver.aput(config(thread_id=f"t{number}"), checkpoint(a=[number]), {}, {"a": "1"}))
    for number in range(3):
        found = saver.get_tuple(config(thread_id=f"t{number}"))
        assert found is not None
        assert found.checkpoint["channel_values"] == {"a": [number]}
