"""What the servers say about themselves, judged; and what a saver does about it when it starts and when it is used."""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import redis
from helpers import put_one, wait_until, with_database
from hypothesis import given
from hypothesis import strategies as st

from checkpointer import (
    BufferedPostgresSaver,
    ConfigurationError,
    UnsupportedServerError,
    checks,
    embedded,
)
from checkpointer.checks import BufferFacts, Clocks, Finding

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from checkpointer.events import CheckpointEvent

GOOD = {
    "redis_version": "7.2.4",
    "role": "master",
    "loading": 0,
    "maxmemory": 0,
    "used_memory": 1000,
    "maxmemory_policy": "noeviction",
    "aof_enabled": 1,
    "aof_last_write_status": "ok",
    "rdb_last_bgsave_status": "ok",
    "cluster_enabled": 0,
}

ROW = {
    "version": 18_00_06,
    "standby": False,
    "read_only": "off",
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    "schema": "public",
}


def of_redis(config: Mapping[str, str] | None = None, **changes: Any) -> dict[str, Finding]:
    info = {name: value for name, value in (GOOD | changes).items() if value is not None}
    return {finding.code: finding for finding in checks.redis_findings(BufferFacts([info], config=config))}


def of_postgres(wanted: str | None = None, **changes: Any) -> dict[str, str]:
    return {finding.code: finding.level for finding in checks.postgres_findings(ROW | changes, schema=wanted)}


def skew(*clocks: tuple[float, float, float]) -> Finding:
    read = Clocks()
    for number, (server, asked, answered) in enumerate(clocks):
        read.note(f"clock {number}", server, asked, answered)
    [finding] = checks.clock_findings(read)
    return finding


# -- the judgements --------------------------------------------------------------------------------------------------


def test_servers_that_are_as_they_should_be_are_fine() -> None:
    assert checks.worst(list(of_redis().values())) == "ok"
    assert set(of_postgres().values()) == {"ok"}


@pytest.mark.parametrize(
    ("policy", "level"),
    [
        ("noeviction", "ok"),
        ("volatile-lru", "ok"),
        ("volatile-ttl", "ok"),
        ("allkeys-lru", "error"),
        ("allkeys-lfu", "error"),
        ("allkeys-random", "error"),
        (None, "warning"),
    ],
)
def test_only_policies_that_can_drop_what_is_not_flushed_are_refused(policy: str | None, level: str) -> None:
    assert of_redis(maxmemory_policy=policy)["redis.eviction"].level == level


@pytest.mark.parametrize(
    ("changes", "config", "level", "says"),
    [
        ({}, None, "ok", "survives a crash of the process"),
        ({}, {"appendfsync": "always"}, "ok", "crash of the machine"),
        ({}, {"appendfsync": "everysec"}, "ok", "about a second"),
        ({}, {"appendfsync": "no"}, "warning", "appendfsync no"),
        ({"aof_enabled": 0}, None, "warning", "memory of one process"),
        ({"aof_enabled": 0}, {"save": ""}, "warning", "nothing on disk"),
        (
            {"aof_enabled": 0, "rdb_changes_since_last_save": 17},
            {"save": "3600 1 300 100"},
            "warning",
            "3600 s after 1 changes, 300 s after 100 changes.*17 changes since",
        ),
        ({"aof_enabled": None}, None, "warning", "does not tell"),
    ],
)
def test_persistence_says_what_a_crash_costs(
    changes: dict[str, Any], config: dict[str, str] | None, level: str, says: str
) -> None:
    found = of_redis(config, **changes)["redis.persistence"]
    assert found.level == level
    assert re.search(says, found.message)
    assert bool(found.advice) == (level != "ok")


@pytest.mark.parametrize(
    ("changes", "code", "level"),
    [
        ({"redis_version": "6.2.1"}, "redis.version", "error"),
        ({"redis_version": "7.2.4", "valkey_version": "9.1.2"}, "redis.version", "ok"),
        ({"redis_version": "unknown"}, "redis.version", "error"),
        ({"loading": 1}, "redis.loading", "error"),
        ({"role": "slave"}, "redis.replica", "error"),
        ({"cluster_enabled": 1}, "redis.cluster", "error"),
        ({"aof_last_write_status": "err"}, "redis.aof_write", "error"),
        ({"rdb_last_bgsave_status": "err"}, "redis.snapshot_failed", "warning"),
        ({"maxmemory": 1000, "used_memory": 950}, "redis.memory", "warning"),
    ],
)
def test_a_redis_in_trouble_is_found(changes: dict[str, Any], code: str, level: str) -> None:
    found = of_redis(**changes)
    assert found[code].level == level
    assert {c for c, finding in found.items() if finding.level != "ok"} <= {code}


def test_a_cluster_is_as_bad_as_its_worst_node_and_says_each_thing_once() -> None:
    nodes = [GOOD | {"cluster_enabled": 1}, GOOD | {"cluster_enabled": 1, "maxmemory_policy": "allkeys-lru"}] * 2
    found = checks.redis_findings(BufferFacts(nodes, cluster_client=True))
    assert [f.code for f in found if f.level != "ok"] == ["redis.eviction"]
    assert len({f.code for f in found}) == len(found)


def test_a_redis_that_hides_everything_is_a_warning_not_a_failure() -> None:
    [finding] = checks.redis_findings(BufferFacts([]))
    assert (finding.level, finding.code) == ("warning", "redis.unchecked")
    assert checks.worst(checks.redis_findings(BufferFacts([{"redis_version": "7.0.0"}]))) == "warning"


@pytest.mark.parametrize(
    ("changes", "code", "level"),
    [
        ({"version": 14_00_05}, "postgres.version", "error"),
        ({"standby": True, "read_only": "on"}, "postgres.standby", "error"),
        ({"read_only": "on"}, "postgres.read_only", "error"),
        ({"fsync": "off"}, "postgres.fsync", "warning"),
        ({"full_page_writes": "off"}, "postgres.fsync", "warning"),
        ({"synchronous_commit": "off"}, "postgres.synchronous_commit", "ok"),
        ({"schema": "other", "wanted": "mine"}, "postgres.schema", "error"),
        ({"schema": None, "wanted": "mine"}, "postgres.schema", "error"),
    ],
)
def test_a_postgres_in_trouble_is_found(changes: dict[str, Any], code: str, level: str) -> None:
    found = of_postgres(**changes)
    assert found[code] == level
    assert {c for c, said in found.items() if said != "ok"} <= {code}


def test_clocks_are_judged_by_what_is_certain() -> None:
    assert skew((100.0, 99.9, 100.1)).level == "ok"
    assert skew((102.0, 99.9, 100.1)).level == "warning"
    assert skew((50.0, 99.9, 100.1)).level == "warning"
    assert skew((170.0, 99.9, 100.1)).level == "error"
    # The answer took ten seconds: the server may have told its time at any moment of them.
    assert skew((108.0, 100.0, 110.0)).level == "ok"
    # Each is nearly right, and the two are apart.
    assert skew((100.8, 100.0, 100.0), (99.1, 100.0, 100.0)).level == "warning"
    assert checks.clock_findings(Clocks()) == []


@given(
    offset=st.floats(-1e5, 1e5, allow_nan=False),
    asked=st.floats(0, 1e9, allow_nan=False),
    there=st.floats(0, 100),
    back=st.floats(0, 100),
)
def test_a_clock_that_is_right_is_never_accused(offset: float, asked: float, there: float, back: float) -> None:
    finding = skew((asked + there, asked, asked + there + back))
    assert finding.level == "ok"
    far = skew((asked + there + offset, asked, asked + there + back))
    if far.level == "error":
        assert abs(offset) > 60 - 1e-3
    if abs(offset) > 60 + there + back + 1e-3:
        assert far.level == "error"


# -- what a saver does about it --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> Iterator[embedded.Servers]:
    """Servers whose settings the tests change, and put back."""
    with embedded.servers(postgres_settings={"fsync": "off", "synchronous_commit": "off"}) as started:
        yield started


@pytest.fixture
def admin(pair: embedded.Servers) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(pair.redis_url) as client:
        yield client
        client.replicaof("NO", "ONE")
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("appendonly", "yes")
        client.flushdb()


@pytest.fixture
def database(pair: embedded.Servers) -> Iterator[str]:
    with psycopg.connect(pair.postgres_uri, autocommit=True) as conn:
        conn.execute("CREATE DATABASE checked TEMPLATE template0")
        yield with_database(pair.postgres_uri, "checked")
        conn.execute("DROP DATABASE checked WITH (FORCE)")


def make(uri: str, url: str, **options: Any) -> tuple[BufferedPostgresSaver, list[CheckpointEvent]]:
    saver = BufferedPostgresSaver.from_conn_string(uri, redis_url=url, hooks=(), triggers=set(), **options)
    events: list[CheckpointEvent] = []
    saver.hooks.add(events.append)
    return saver, events


def unsafe(saver: BufferedPostgresSaver, events: list[CheckpointEvent]) -> list[tuple[str, str]]:
    assert saver.hooks.flush(10)
    found = [event for event in events if event.name == "server.unsafe"]
    assert all(event.error_type and event.context["advice"] and event.message for event in found)
    return sorted((event.context["code"], event.severity) for event in found)


def test_setup_reports_what_is_weak_once_and_goes_on(pair: embedded.Servers, database: str, admin: redis.Redis) -> None:
    admin.config_set("appendonly", "no")
    saver, events = make(database, pair.redis_url)
    with saver:
        saver.setup()
        saver.setup()
        put_one(saver, "t")
        assert unsafe(saver, events) == [("postgres.fsync", "warning"), ("redis.persistence", "warning")]
        assert saver.flush()


async def test_the_asynchronous_setup_does_the_same(pair: embedded.Servers, database: str, admin: redis.Redis) -> None:
    admin.config_set("appendonly", "no")
    saver, events = make(database, pair.redis_url)
    async with saver:
        await saver.asetup()
        assert unsafe(saver, events) == [("postgres.fsync", "warning"), ("redis.persistence", "warning")]
        admin.config_set("maxmemory-policy", "allkeys-random")
        with pytest.raises(UnsupportedServerError, match="allkeys-random"):
            await saver.asetup()


def test_a_redis_that_evicts_is_refused_by_setup_and_at_first_use(
    pair: embedded.Servers, database: str, admin: redis.Redis
) -> None:
    saver, _ = make(database, pair.redis_url)
    with saver:
        saver.setup()
    admin.config_set("maxmemory-policy", "allkeys-lru")
    saver, _ = make(database, pair.redis_url)
    with saver:
        with pytest.raises(UnsupportedServerError, match=r"allkeys-lru.*noeviction"):
            saver.setup()
        with pytest.raises(UnsupportedServerError, match="allkeys-lru"):
            put_one(saver, "t")
        assert admin.dbsize() == 0
        admin.config_set("maxmemory-policy", "volatile-lru")
        put_one(saver, "t")


@pytest.mark.parametrize("denied", ["info", "config"])
async def test_a_command_that_is_denied_is_no_outage(
    pair: embedded.Servers, database: str, admin: redis.Redis, denied: str
) -> None:
    admin.acl_setuser(
        "limited", enabled=True, nopass=True, keys=["*"], categories=["+@all"], commands=[f"-{denied}"], reset=True
    )
    url = pair.redis_url.replace("redis://", "redis://limited:any@")
    for asynchronous in (False, True):
        saver, events = make(database, url)
        async with saver:
            if asynchronous:
                await saver.asetup()
            else:
                saver.setup()
            put_one(saver, "t")
            expected = [("postgres.fsync", "warning")]
            expected += [("redis.unchecked", "warning")] if denied == "info" else []
            assert unsafe(saver, events) == expected
            assert not [event for event in events if event.name == "backend.down"]


def test_a_replica_is_refused_by_setup_and_gone_around_in_use(
    pair: embedded.Servers, database: str, admin: redis.Redis
) -> None:
    saver, _ = make(database, pair.redis_url)
    with saver:
        saver.setup()
    admin.replicaof("127.0.0.1", 1)
    saver, events = make(database, pair.redis_url)
    with saver:
        with pytest.raises(UnsupportedServerError, match="replica"):
            saver.setup()
        put_one(saver, "t")
        put_one(saver, "t")
        assert ("redis.replica", "error") in unsafe(saver, events)
        assert [event.name for event in events].count("backend.down") == 1
        with psycopg.connect(database) as conn:
            assert conn.execute("SELECT count(*) FROM checkpoints").fetchone() == (2,)
        admin.replicaof("NO", "ONE")
        wait_until(lambda: put_one(saver, "t") and admin.dbsize() > 0)


def test_a_node_of_a_cluster_needs_a_cluster_client(postgres_uri: str) -> None:
    with embedded.servers(valkey_args=["--cluster-enabled", "yes"]) as pair:
        saver, _ = make(postgres_uri, pair.redis_url)
        with saver, pytest.raises(ConfigurationError, match=r"redis\+cluster://"):
            saver.setup()


def test_a_read_only_database_is_refused_by_setup_and_buffered_for_in_use(
    pair: embedded.Servers, database: str, admin: redis.Redis
) -> None:
    saver, _ = make(database, pair.redis_url)
    with saver:
        saver.setup()
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute("ALTER DATABASE checked SET default_transaction_read_only = on")
        saver, events = make(database, pair.redis_url, close_timeout=0.5)
        with saver:
            with pytest.raises(UnsupportedServerError, match="default_transaction_read_only"):
                saver.setup()
            put_one(saver, "t")
            assert ("postgres.read_only", "error") in unsafe(saver, events)
            assert not saver.flush("t")
            conn.execute("SET default_transaction_read_only = off")
            conn.execute("ALTER DATABASE checked RESET default_transaction_read_only")
            wait_until(lambda: bool(saver.flush("t")))


def test_a_standby_is_refused(own_servers: embedded.Servers) -> None:
    saver, _ = make(own_servers.postgres_uri, own_servers.redis_url)
    with saver:
        saver.setup()
    with psycopg.connect(own_servers.postgres_uri) as conn:
        [folder] = conn.execute("SHOW data_directory").fetchone() or []
    own_servers.postgres.stop()
    Path(folder, "standby.signal").touch()
    own_servers.postgres.start()
    saver, _ = make(own_servers.postgres_uri, own_servers.redis_url)
    with saver:
        with pytest.raises(UnsupportedServerError, match="standby"):
            saver.setup()
        with pytest.raises(UnsupportedServerError, match="standby"):
            put_one(saver, "t")


def test_clocks_far_apart_are_refused_by_setup_and_reported_in_use(
    pair: embedded.Servers, database: str, admin: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, events = make(database, pair.redis_url)
    with saver:
        saver.setup()
        assert "clock.skew" not in dict(unsafe(saver, events))
    # The clock of a machine cannot be set for a test; this one says that it is 75 seconds ahead.
    monkeypatch.setattr("checkpointer.operations.time", SimpleNamespace(time=lambda: time.time() + 75))
    saver, events = make(database, pair.redis_url)
    with saver, pytest.raises(UnsupportedServerError, match=r"differ by at least 7\d\.\d s"):
        saver.setup()
    saver, events = make(database, pair.redis_url)
    with saver:
        put_one(saver, "t")
        assert ("clock.skew", "error") in unsafe(saver, events)


def test_each_code_that_may_pass_or_is_a_setting_is_one_that_exists() -> None:
    source = Path(checks.__file__).read_text()
    for code in checks.PASSING | checks._CONFIGURATION:
        assert source.count(f'"{code}"') >= 2, code
