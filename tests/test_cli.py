"""The command line, run as a process of its own or, with queries of the test, inside this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from checkpointer import cli
from checkpointer.store import schema
from observability import queries

RUN = "from checkpointer.cli import main; main()"


def run(*arguments: str, script: str = RUN, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("POSTGRES_URI", "REDIS_URL")}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=clean | {"NO_COLOR": "1"} | environment,
    )


def failed(done: subprocess.CompletedProcess[str]) -> str:
    """Assert that a command failed with one line and no traceback, and return the line."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_migrate_sets_up_and_check_tells_what_is_pending(postgres_uri: str) -> None:
    before = run("migrate", "--check", POSTGRES_URI=postgres_uri)
    assert before.returncode == 1
    with psycopg.connect(postgres_uri, autocommit=True) as conn:
        names = schema.pending(conn)
        assert before.stdout.splitlines() == [f"pending: {name}" for name in names]
        done = run("migrate", "--postgres-uri", postgres_uri, "--redis-url", "redis://unused")
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [f"applied: {name}" for name in names]
        assert schema.is_set_up(conn)
    for arguments in (["migrate", "--check"], ["migrate"]):
        again = run(*arguments, POSTGRES_URI=postgres_uri, REDIS_URL="redis://unused")
        assert (again.returncode, again.stdout) == (0, "Nothing is pending.\n")


def test_an_unreachable_server_is_one_line() -> None:
    line = failed(run("migrate", "--postgres-uri", "postgresql://me:secret@127.0.0.1:1/db"))
    assert "Postgres cannot be reached" in line
    assert "secret" not in line


def test_a_missing_or_malformed_address_is_one_line_that_shows_no_password() -> None:
    assert "POSTGRES_URI" in failed(run("migrate"))
    line = failed(run("migrate", POSTGRES_URI="postgres:/me:secret@host"))
    assert "not a valid connection string" in line
    assert "secret" not in line


def test_an_applied_migration_that_was_changed_is_one_line(postgres_uri: str) -> None:
    with psycopg.connect(postgres_uri, autocommit=True) as conn:
        schema.setup(conn)
        conn.execute("UPDATE checkpointer_migrations SET checksum = 'other'")
    assert "0001_" in failed(run("migrate", POSTGRES_URI=postgres_uri))


def test_a_missing_right_is_one_line(postgres_uri: str) -> None:
    with psycopg.connect(postgres_uri, autocommit=True) as conn:
        conn.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
        conn.execute("CREATE ROLE outsider LOGIN")
    try:
        uri = make_conninfo(postgres_uri, options="-c role=outsider")
        assert "permission denied" in failed(run("migrate", POSTGRES_URI=uri))
    finally:
        with psycopg.connect(postgres_uri, autocommit=True) as conn:
            conn.execute("DROP ROLE outsider")


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_it_says_what_to_install(missing: str) -> None:
    done = run("migrate", script=f"import sys; sys.modules[{missing!r}] = None; {RUN}")
    assert done.returncode == 2
    assert done.stderr == 'The command line needs: pip install "langgraph-checkpoint-buffered[cli]"\n'


def test_without_a_command_it_shows_the_commands_and_a_wrong_one_is_wrong_usage() -> None:
    assert "migrate" in run().stdout + run().stderr
    assert run("migrat").returncode == 2


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two queries in the place of the shipped ones."""
    texts = {
        "values": """SELECT 1 AS number, '[bold]x[/bold]' || chr(27) || '[31m' AS markup, NULL AS nothing,
                     '{"a": [1]}'::jsonb AS document, '2030-01-02T03:04:05Z'::timestamptz AS moment""",
        "missing": "SELECT * FROM not_there",
        "empty": "SELECT 1 AS number WHERE false",
    }

    def fetch(conn: psycopg.Connection[Any], name: str) -> list[dict[str, Any]]:
        with conn.cursor(row_factory=psycopg.rows.dict_row) as cur:
            return cur.execute(texts[name]).fetchall()  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(queries, "names", lambda: list(texts), raising=False)
    monkeypatch.setattr(queries, "sql", texts.__getitem__, raising=False)
    monkeypatch.setattr(queries, "run", fetch, raising=False)


def inside(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["checkpointer", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


@pytest.mark.usefixtures("shipped")
def test_query_list_needs_no_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("POSTGRES_URI", raising=False)
    assert inside(monkeypatch, "query", "--list") == 0
    assert capsys.readouterr().out.splitlines() == ["values", "missing", "empty"]


@pytest.mark.usefixtures("shipped")
def test_query_prints_a_table_without_markup_or_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], postgres_uri: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("POSTGRES_URI", postgres_uri)
    assert inside(monkeypatch, "query", "values") == 0
    out = capsys.readouterr().out
    assert "[bold]x[/bold]" in out
    assert "\x1b" not in out
    assert '{"a":[1]}' in out
    assert inside(monkeypatch, "query", "empty") == 0
    assert capsys.readouterr().out == "No rows.\n"


@pytest.mark.usefixtures("shipped")
def test_query_json_can_be_read_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], postgres_uri: str
) -> None:
    assert inside(monkeypatch, "query", "values", "--json", "--postgres-uri", postgres_uri) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert (row["number"], row["nothing"], row["document"]) == (1, None, {"a": [1]})
    assert datetime.fromisoformat(row["moment"]) == datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert inside(monkeypatch, "query", "empty", "--json", "--postgres-uri", postgres_uri) == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.usefixtures("shipped")
def test_query_with_missing_tables_says_to_migrate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], postgres_uri: str
) -> None:
    assert inside(monkeypatch, "query", "missing", "--postgres-uri", postgres_uri) == 1
    assert "checkpointer migrate" in capsys.readouterr().err


@pytest.mark.usefixtures("shipped")
def test_an_unknown_query_is_wrong_usage_and_names_the_known_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["query", "valeus"], ["query"]):
        assert inside(monkeypatch, *arguments) == 2
        assert "values" in capsys.readouterr().err


def test_every_shipped_query_runs_on_a_database_that_is_set_up(postgres_uri: str) -> None:
    assert run("migrate", POSTGRES_URI=postgres_uri).returncode == 0
    names = run("query", "--list").stdout.split()
    assert names
    for name in names:
        done = run("query", name, "--json", POSTGRES_URI=postgres_uri)
        assert done.returncode == 0, f"{name}: {done.stderr}"
        assert isinstance(json.loads(done.stdout), list)
