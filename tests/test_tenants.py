"""Tenants: savers with schemas and prefixes of their own share servers, and nothing else."""

from __future__ import annotations

import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import redis
from helpers import put_one, wait_until
from hypothesis import given
from hypothesis import strategies as st
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.postgres import PostgresSaver
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg_pool import AsyncConnectionPool, ConnectionPool

import observability
from checkpointer import (
    BufferedPostgresSaver,
    CheckpointEvent,
    ConfigurationError,
    MigrationError,
    NotSetUpError,
    cli,
    search_path,
)
from checkpointer.buffer.keys import KeyLayout
from checkpointer.doctor import diagnose
from checkpointer.options import BufferOptions
from checkpointer.worker import Worker
from observability import target

if TYPE_CHECKING:
    from collections.abc import Iterator

QUIET: dict[str, Any] = {"triggers": frozenset()}


def make(uri: str, url: str, prefix: str, schema: str | None, **options: Any) -> BufferedPostgresSaver:
    return BufferedPostgresSaver.from_conn_string(
        uri, redis_url=url, prefix=prefix, schema=schema, **({"hooks": ()} | QUIET | options)
    )


@pytest.fixture(params=["prefixes", "one prefix"])
def tenants(
    request: pytest.FixtureRequest, postgres_uri: str, redis_url: str, prefix: str
) -> Iterator[tuple[BufferedPostgresSaver, BufferedPostgresSaver]]:
    """Two set-up savers on the same servers with schemas of their own; under one prefix the buffers are apart too."""
    second = f"{prefix}.b" if request.param == "prefixes" else prefix
    hooks = ("thread_log", "system_errors")
    with (
        make(postgres_uri, redis_url, prefix, "tenant_a", hooks=hooks) as a,
        make(postgres_uri, redis_url, second, "tenant_b", hooks=hooks) as b,
    ):
        a.setup()
        b.setup()
        yield a, b
        with redis.Redis.from_url(redis_url) as client:
            for key in client.scan_iter(f"{second}:*"):
                client.unlink(key)


def config(thread_id: str) -> Any:
    return {"configurable": {"thread_id": thread_id, "checkpoint_ns": ""}}


def value(saver: PostgresSaver, thread_id: str) -> Any:
    found = saver.get_tuple(config(thread_id))
    return found and found.checkpoint["channel_values"]["a"]


def listed(saver: PostgresSaver) -> list[Any]:
    return sorted(found.checkpoint["channel_values"]["a"] for found in saver.list(None))


Pair = tuple[BufferedPostgresSaver, BufferedPostgresSaver]


@pytest.mark.parametrize("flushed", [False, True])
def test_the_same_thread_ids_hold_what_each_tenant_put(tenants: Pair, flushed: bool) -> None:
    a, b = tenants
    put_one(a, "t", "of a")
    put_one(a, "only a", "a alone")
    put_one(b, "t", "of b")
    if flushed:
        assert a.flush().checkpoints == 2
        assert b.flush().checkpoints == 1
    assert (value(a, "t"), value(b, "t")) == (["of a"], ["of b"])
    assert value(b, "only a") is None
    assert listed(a) == [["a alone"], ["of a"]]
    assert listed(b) == [["of b"]]


def test_flushing_everything_flushes_ones_own(tenants: Pair) -> None:
    a, b = tenants
    put_one(a, "t", "of a")
    assert b.flush().threads == 0
    assert a.flush().threads == 1


def test_deleting_pruning_and_copying_change_ones_own_only(tenants: Pair) -> None:
    a, b = tenants
    for saver, name in ((a, "of a"), (b, "of b")):
        for number in range(3):
            put_one(saver, "t", f"{name} {number}", run_id="run")
        put_one(saver, "u", name, run_id="run")
    before = listed(b)
    assert len(before) == 4
    a.prune(["t"])
    assert listed(a) == [["of a"], ["of a 2"]]
    a.copy_thread("u", "v")
    a.delete_thread("t")
    assert listed(a) == [["of a"], ["of a"]]
    a.delete_for_runs(["run"])
    assert listed(a) == []
    assert listed(b) == before
    put_one(b, "t", "late")
    assert value(a, "t") is None


def test_errors_and_thread_logs_go_to_the_tenant_that_they_are_about(tenants: Pair, postgres_uri: str) -> None:
    a, b = tenants
    a.hooks.emit(
        CheckpointEvent(
            name="flush.failed",
            error_type="checkpoint_flush_error",
            severity="critical",
            message="about a",
            thread_id="t",
            user_notice=True,
        )
    )
    assert a.hooks.flush(10)
    assert b.hooks.flush(10)
    with psycopg.connect(postgres_uri, autocommit=True) as conn:

        def rows(table: str) -> int:
            [count] = conn.execute(
                sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(*table.split(".")))
            ).fetchone() or [0]
            return int(count)

        wait_until(lambda: rows("tenant_a.system_errors") == 1)
        wait_until(lambda: rows("tenant_a.thread_logs") == 1)
        assert rows("tenant_b.system_errors") == rows("tenant_b.thread_logs") == 0
        assert conn.execute("SELECT to_regclass('public.system_errors')").fetchone() == (None,)


async def test_both_worlds_of_a_saver_work_in_the_schema(postgres_uri: str, redis_url: str, prefix: str) -> None:
    async with make(postgres_uri, redis_url, prefix, "tenant") as saver:
        await saver.asetup()
        await saver.aput(config("t"), *_arguments("v"))
        assert await saver.aflush()
        assert [found.checkpoint["channel_values"] async for found in saver.alist(config("t"))] == [{"a": ["v"]}]
        assert value(saver, "t") == ["v"]
        stock_uri = make_conninfo(postgres_uri, options="-c search_path=tenant")
        with PostgresSaver.from_conn_string(stock_uri) as stock:
            assert value(stock, "t") == ["v"]
    with psycopg.connect(postgres_uri) as conn:
        made = conn.execute("SELECT DISTINCT schemaname FROM pg_tables WHERE tablename ~ '^(checkpoint|system|thread)'")
        assert made.fetchall() == [("tenant",)]


def _arguments(channel_value: str) -> Any:
    checkpoint = empty_checkpoint()
    checkpoint["channel_values"], checkpoint["channel_versions"] = {"a": [channel_value]}, {"a": "1"}
    return checkpoint, {"source": "input", "step": -1, "parents": {}}, {"a": "1"}


# -- the schema ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a b", 'Mi"xed', "back\\slash", "it's; --", "ünï-1", "tab\tand\nline", "x" * 63, "select"]
)
def test_a_schema_may_have_an_odd_name(postgres_uri: str, redis_url: str, prefix: str, name: str) -> None:
    with make(postgres_uri, redis_url, prefix, name) as saver:
        saver.setup()
        put_one(saver, "t", "v")
        assert saver.flush()
        assert listed(saver) == [["v"]]
        assert diagnose(postgres_uri, redis_url, options=saver.options).level == "ok"
    with psycopg.connect(postgres_uri) as conn:
        found = conn.execute("SELECT schemaname FROM pg_tables WHERE tablename = 'checkpoints'").fetchall()
        assert found == [(name,)]


@pytest.mark.parametrize(
    "name", ["", "pg_catalog", "pg_x", "$user", "information_schema", "x" * 64, "a\0b", "\ud800", 7]
)
def test_a_schema_that_cannot_be_is_refused_at_the_door(name: Any) -> None:
    with pytest.raises(ConfigurationError, match="schema="):
        BufferOptions(schema=name)


def test_connection_options_that_are_there_stay(
    postgres_uri: str, redis_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settings(uri: str, **pool_settings: Any) -> dict[str, str]:
        with ExitStack() as stack:
            given = stack.enter_context(ConnectionPool(uri, kwargs=pool_settings)) if pool_settings else uri
            saver = stack.enter_context(
                BufferedPostgresSaver(given, redis_url, prefix=prefix, schema="tenant", hooks=(), **QUIET)
            )
            with saver._core.postgres.unchecked() as conn:
                names = ("search_path", "work_mem", "application_name")
                return {name: (conn.execute(f"SHOW {name}").fetchone() or {})[name] for name in names}

    ours = {"search_path": '"tenant"', "work_mem": "5MB", "application_name": "mine"}
    options = "-c work_mem=5MB -c search_path=public -c application_name=mine"
    assert settings(make_conninfo(postgres_uri, options=options)) == ours
    assert settings(f"{postgres_uri}?options=-c%20work_mem%3D5MB&application_name=mine") == ours
    assert settings(postgres_uri, options=options) == ours
    monkeypatch.setenv("PGOPTIONS", options)
    assert settings(postgres_uri) == ours


def test_ones_own_pool_has_to_work_in_the_schema(postgres_uri: str, redis_url: str, prefix: str) -> None:
    with make(postgres_uri, redis_url, prefix, "tenant") as saver:
        saver.setup()
    options: dict[str, Any] = {"prefix": prefix, "schema": "tenant", "hooks": (), **QUIET}
    with ConnectionPool(postgres_uri, min_size=1) as pool, BufferedPostgresSaver(pool, redis_url, **options) as saver:
        with pytest.raises(ConfigurationError, match=r"schema='tenant' is not in effect.*'public'.*search_path"):
            put_one(saver, "t")
        with pytest.raises(ConfigurationError, match="not in effect"), saver._cursor():
            pass
    right = {"options": "-c search_path=tenant"}
    with (
        ConnectionPool(postgres_uri, min_size=1, kwargs=right) as pool,
        BufferedPostgresSaver(pool, redis_url, **options) as saver,
    ):
        put_one(saver, "t", "v")
        assert saver.flush()
        assert listed(saver) == [["v"]]


async def test_the_asynchronous_pool_is_looked_at_by_itself(postgres_uri: str, redis_url: str, prefix: str) -> None:
    right = {"options": "-c search_path=tenant"}
    async with (
        AsyncConnectionPool(postgres_uri, min_size=1, open=False) as apool,
        AsyncConnectionPool(postgres_uri, min_size=1, open=False, kwargs=right) as good,
    ):
        with ConnectionPool(postgres_uri, min_size=1, kwargs=right) as pool:
            options: dict[str, Any] = {"prefix": prefix, "schema": "tenant", "hooks": (), **QUIET}
            async with BufferedPostgresSaver(pool, redis_url, async_conn=apool, **options) as saver:
                saver.setup()
                put_one(saver, "t", "v")
                assert value(saver, "t") == ["v"]
                with pytest.raises(ConfigurationError, match="not in effect"):
                    await saver.aget_tuple(config("t"))
            async with BufferedPostgresSaver(pool, redis_url, async_conn=good, **options) as saver:
                assert await saver.aget_tuple(config("t"))


def test_tables_of_another_schema_on_the_search_path_do_not_do(postgres_uri: str, redis_url: str, prefix: str) -> None:
    with make(postgres_uri, redis_url, prefix, None) as saver:
        saver.setup()
    with psycopg.connect(postgres_uri, autocommit=True) as conn:
        conn.execute("CREATE SCHEMA tenant")
    both = {"options": "-c search_path=tenant,public"}
    with (
        ConnectionPool(postgres_uri, min_size=1, kwargs=both) as pool,
        BufferedPostgresSaver(pool, redis_url, prefix=prefix, schema="tenant", hooks=(), **QUIET) as saver,
    ):
        with pytest.raises(NotSetUpError, match="setup"):
            put_one(saver, "t")
        saver.setup()
        put_one(saver, "t")


def test_without_setup_the_missing_schema_is_named(postgres_uri: str, redis_url: str, prefix: str) -> None:
    with make(postgres_uri, redis_url, prefix, "tenant") as saver:
        with pytest.raises(ConfigurationError, match=r"no schema at all.*setup\(\)"):
            put_one(saver, "t")
        report = diagnose(postgres_uri, redis_url, options=saver.options)
        assert [f.code for f in report.findings if f.level == "error"] == ["postgres.schema"]


def test_who_may_not_create_the_schema_is_told_what_to_ask_for(postgres_uri: str, redis_url: str, prefix: str) -> None:
    role = f"role_{prefix}"
    with psycopg.connect(postgres_uri, autocommit=True) as admin:
        admin.execute(f"CREATE ROLE {role} LOGIN")
        try:
            uri = make_conninfo(postgres_uri, options=f"-c role={role}")
            with make(uri, redis_url, prefix, "my tenant") as saver:
                with pytest.raises(MigrationError, match='CREATE SCHEMA "my tenant" AUTHORIZATION'):
                    saver.setup()
                admin.execute(f'CREATE SCHEMA "my tenant" AUTHORIZATION {role}')
                saver.setup()
                put_one(saver, "t")
                assert saver.flush()
        finally:
            admin.execute(f"DROP OWNED BY {role}")
            admin.execute(f"DROP ROLE {role}")


def test_many_may_set_up_one_new_schema_at_once(postgres_uri: str, redis_url: str, prefix: str) -> None:
    savers = [make(postgres_uri, redis_url, prefix, "tenant") for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(saver.setup) for saver in savers]:
            done.result()
    for saver in savers:
        saver.close()


def test_a_pooler_that_refuses_the_option_is_named(redis_url: str, prefix: str) -> None:
    # What pgbouncer answers to a start-up parameter that it neither tracks nor was told to ignore.
    fields = b"SFATAL\0C08P01\0Munsupported startup parameter: options\0\0"
    answer = b"E" + (len(fields) + 4).to_bytes(4, "big") + fields
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for _ in range(2):
                client, _ = listener.accept()
                with client:
                    client.recv(4096)
                    client.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        uri = f"postgresql://me@127.0.0.1:{listener.getsockname()[1]}/db?sslmode=disable&gssencmode=disable"
        with make(uri, redis_url, prefix, "tenant") as saver:
            with pytest.raises(ConfigurationError, match="ignore_startup_parameters"):
                saver.setup()
            report = diagnose(uri, redis_url, options=saver.options)
        assert "ignore_startup_parameters" in next(f for f in report.findings if f.level == "error").message


# -- prefixes --------------------------------------------------------------------------------------------------------


def test_two_prefixes_in_one_schema_have_buffers_apart_and_the_checkpoint_tables_in_common(
    postgres_uri: str, redis_url: str, prefix: str
) -> None:
    with (
        make(postgres_uri, redis_url, prefix, None) as a,
        make(postgres_uri, redis_url, f"{prefix}.b", None) as b,
        redis.Redis.from_url(redis_url) as client,
    ):
        a.setup()
        b.setup()
        put_one(a, "of a", "a")
        put_one(b, "of b", "b")
        # Buffered: each knows its own only, and flushes its own only.
        assert (value(a, "of b"), value(b, "of a")) == (None, None)
        assert a.flush().threads == 1
        assert value(b, "of a") == ["a"]
        assert value(a, "of b") is None
        assert client.exists(*client.scan_iter(f"{prefix}.b:*")) > 0
        a.delete_thread("of b")
        assert b.flush()
        # The tables know thread ids and no prefixes: what is flushed belongs to both.
        assert listed(a) == listed(b) == [["a"], ["b"]]
        client.delete(*client.scan_iter(f"{prefix}.b:*"))


def keys_of(options: BufferOptions, thread_id: str) -> set[bytes]:
    layout = KeyLayout(options.key_prefix, options.partitions)
    return {
        *layout.thread(thread_id),
        layout.state(0),
        layout.threads(0),
        f"{options.key_prefix}:ev:errors".encode(),
    }


PREFIXES = st.text("ab.-_0", min_size=1, max_size=4)
SCHEMAS = st.none() | st.text("ab:{}.", min_size=1, max_size=4)
THREADS = st.text("ab:{}.-0dowcf", min_size=1, max_size=12) | st.sampled_from(
    ["}:d:t", "a:{a.0.0}:d:t", "ev:errors", "{b}", "..:sequence"]
)


@given(prefixes=st.tuples(PREFIXES, PREFIXES), schemas=st.tuples(SCHEMAS, SCHEMAS), threads=st.tuples(THREADS, THREADS))
def test_no_prefix_schema_and_thread_id_reach_another_tenants_keys(
    prefixes: tuple[str, str], schemas: tuple[str | None, str | None], threads: tuple[str, str]
) -> None:
    one, other = (BufferOptions(prefix=p, schema=s, partitions=1) for p, s in zip(prefixes, schemas, strict=True))
    same = (one.prefix, one.schema) == (other.prefix, other.schema)
    assert bool(keys_of(one, threads[0]) & keys_of(other, threads[1])) == same


def test_a_prefix_with_a_separator_is_refused() -> None:
    for bad in ("a:b", "a{b", "a}b", "a*", "", "ä", "a b", "a\0"):
        with pytest.raises(ConfigurationError, match="prefix="):
            BufferOptions(prefix=bad)
    assert search_path.key_prefix("a", "s") != search_path.key_prefix("a", "t")


# -- beside the saver ------------------------------------------------------------------------------------------------


def test_the_commands_work_in_the_schema(
    postgres_uri: str, redis_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*arguments: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["checkpointer", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, capsys.readouterr().out

    monkeypatch.setenv("POSTGRES_URI", postgres_uri)
    monkeypatch.setenv("REDIS_URL", redis_url)
    assert command("migrate", "--check", "--schema", "my tenant")[0] == 1
    assert command("migrate", "--schema", "my tenant")[0] == 0
    assert command("migrate", "--check")[0] == 1
    monkeypatch.setenv("CHECKPOINTER_SCHEMA", "my tenant")
    assert command("migrate", "--check") == (0, "Nothing is pending.\n")
    with psycopg.connect(postgres_uri, autocommit=True) as conn:
        conn.execute(
            'INSERT INTO "my tenant".system_errors (error_type, severity, error_message) VALUES (%s, %s, %s)',
            ["e", "critical", "of the tenant"],
        )
    assert "of the tenant" in command("query", "unresolved_criticals", "--json")[1]
    code, out = command("doctor", "--prefix", "nobody")
    assert code == 0
    assert "1 critical errors" in out


async def test_reports_without_a_saver_go_to_the_schema_of_the_environment(
    postgres_uri: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTGRES_URI", postgres_uri)
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("CHECKPOINTER_SCHEMA", "tenant")
    monkeypatch.setattr(sys, "argv", ["checkpointer", "migrate"])
    with pytest.raises(SystemExit):
        cli.main()
    await observability.log_system_error(error_type="mine", severity="error", error_message="m")
    assert target.current().flush()
    target.current().close()
    with psycopg.connect(postgres_uri) as conn:
        assert conn.execute("SELECT error_type FROM tenant.system_errors").fetchall() == [("mine",)]


def test_a_worker_flushes_the_tenant_that_it_is_for(tenants: Pair, postgres_uri: str, redis_url: str) -> None:
    for saver in tenants:
        put_one(saver, "t", "waits")
    a, b = tenants
    with Worker(postgres_uri, redis_url, prefix=b.options.prefix, schema=b.options.schema, hooks=()) as worker:
        assert worker.stop()
    assert b.flush().checkpoints == 0
    assert a.flush().checkpoints == 1
