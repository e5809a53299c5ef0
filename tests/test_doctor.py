"""The doctor: what he finds between the servers, and that he finds something to say whatever the servers do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import redis
from helpers import put_one, wait_until
from psycopg.conninfo import make_conninfo

from checkpointer import BufferedPostgresSaver, cli, doctor, embedded
from checkpointer.doctor import Report, diagnose
from checkpointer.options import BufferOptions
from checkpointer.store import schema
from observability.spool import Spool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from checkpointer.checks import Finding

QUIET: dict[str, Any] = {"hooks": (), "triggers": frozenset()}


@pytest.fixture(autouse=True)
def _spool_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor tells of reports that other tests may have left in the session's."""
    monkeypatch.setenv("CHECKPOINTER_SPOOL_DIR", str(tmp_path / "spool"))


@pytest.fixture
def saver(postgres_uri: str, redis_url: str, prefix: str) -> Iterator[BufferedPostgresSaver]:
    """A set-up saver that flushes only when told to."""
    with BufferedPostgresSaver.from_conn_string(postgres_uri, redis_url=redis_url, prefix=prefix, **QUIET) as made:
        made.setup()
        yield made


def found(report: Report) -> dict[str, Finding]:
    return {finding.code: finding for finding in report.findings}


def serious(report: Report) -> dict[str, str]:
    return {finding.code: finding.level for finding in report.findings if finding.level != "ok"}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    names = ("POSTGRES_URI", "REDIS_URL", "CHECKPOINTER_SCHEMA", "CHECKPOINTER_PREFIX")
    clean = {key: value for key, value in os.environ.items() if key not in names}
    done = subprocess.run(
        [sys.executable, "-c", "from checkpointer.cli import main; main()", "doctor", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=clean | {"NO_COLOR": "1"} | environment,
    )
    assert "Traceback" not in done.stderr
    return done


def test_a_healthy_pair_is_healthy_and_counted(
    saver: BufferedPostgresSaver, postgres_uri: str, redis_url: str, prefix: str
) -> None:
    for thread in "abc":
        put_one(saver, thread)
    assert saver.flush()
    report = diagnose(postgres_uri, redis_url, options=saver.options)
    assert report
    assert serious(report) == {}
    assert "3 threads" in found(report)["postgres.threads"].message
    assert "flushed" in found(report)["redis.lag"].message
    assert {"postgres.migrations", "postgres.criticals", "redis.persistence", "clock.skew"} <= set(found(report))


def test_nothing_is_changed(saver: BufferedPostgresSaver, postgres_uri: str, redis_url: str, prefix: str) -> None:
    put_one(saver, "t")
    with redis.Redis.from_url(redis_url) as client, psycopg.connect(postgres_uri, autocommit=True) as conn:
        tables = "SELECT sum(n_tup_ins + n_tup_upd + n_tup_del) FROM pg_stat_user_tables"
        before = {key: client.dump(key) for key in client.scan_iter(f"{prefix}:*")}
        counts = conn.execute(tables).fetchone()
        assert diagnose(postgres_uri, redis_url, options=saver.options)
        assert {key: client.dump(key) for key in client.scan_iter(f"{prefix}:*")} == before
        assert conn.execute(tables).fetchone() == counts


def test_what_waits_is_told_with_its_age_for_every_prefix_of_the_database(
    saver: BufferedPostgresSaver,
    postgres_uri: str,
    redis_url: str,
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_one(saver, "one")
    with redis.Redis.from_url(redis_url) as client:
        begun = client.time()
        wait_until(lambda: client.time() > (begun[0], begun[1] + 2_000))  # ages are in milliseconds
    put_one(saver, "two")
    other = BufferOptions(prefix="not-used-yet")
    report = diagnose(postgres_uri, redis_url, options=other)
    lags = {finding.message for finding in report.findings if finding.code == "redis.lag"}
    assert len(lags) == 2
    assert any("2 threads" in message and f"{prefix!r}" in message and "'one'" in message for message in lags)
    assert report.level == "ok"
    assert prefix in found(report)["postgres.prefix"].message
    monkeypatch.setattr(doctor, "_LAG_WARNING", 0.0)
    report = diagnose(postgres_uri, redis_url, options=saver.options)
    assert report
    assert serious(report) == {"redis.lag": "warning"}
    monkeypatch.setattr(doctor, "_LAG_ERROR", 0.0)
    assert not diagnose(postgres_uri, redis_url, options=saver.options)


def test_a_partition_that_somebody_keeps_is_told_with_who(
    saver: BufferedPostgresSaver,
    postgres_uri: str,
    redis_url: str,
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with psycopg.connect(make_conninfo(postgres_uri, application_name="stuck one")) as conn:
        conn.execute(
            "SELECT FROM checkpoint_buffer_partitions WHERE prefix = %s AND partition = 7 FOR UPDATE", [prefix]
        )
        assert serious(diagnose(postgres_uri, redis_url, options=saver.options)) == {}
        monkeypatch.setattr(doctor, "_HELD_SECONDS", 0.0)
        report = diagnose(postgres_uri, redis_url, options=saver.options)
        assert serious(report) == {"postgres.held": "warning"}
        said = found(report)["postgres.held"]
        assert f"{prefix}/7" in said.message
        assert "stuck one" in said.message
        assert f"pg_terminate_backend({conn.info.backend_pid})" in said.advice
        conn.rollback()
        assert serious(diagnose(postgres_uri, redis_url, options=saver.options)) == {}


def test_dead_letters_are_an_error_and_criticals_a_warning(
    saver: BufferedPostgresSaver, postgres_uri: str, redis_url: str, prefix: str
) -> None:
    with psycopg.connect(postgres_uri, autocommit=True) as conn:
        conn.execute("DROP TABLE IF EXISTS checkpoint_dead_letters")
        assert "postgres.dead_letters" not in found(diagnose(postgres_uri, redis_url, options=saver.options))
        conn.execute("CREATE TABLE checkpoint_dead_letters (prefix TEXT, thread_id TEXT, resolved_at TIMESTAMPTZ)")
        conn.execute("INSERT INTO checkpoint_dead_letters VALUES (%s, 'solved', now()), ('other', 'x', NULL)", [prefix])
        insert = (
            "INSERT INTO system_errors (error_type, severity, error_message, resolved_at) VALUES ('e', %s, 'm', %s)"
        )
        conn.execute(insert, ["critical", "2030-01-01"])
        conn.execute(insert, ["error", None])
        assert serious(diagnose(postgres_uri, redis_url, options=saver.options)) == {}
        conn.execute("INSERT INTO checkpoint_dead_letters VALUES (%s, 'pinned', NULL)", [prefix])
        conn.execute(insert, ["critical", None])
    report = diagnose(postgres_uri, redis_url, options=saver.options)
    assert not report
    assert serious(report) == {"postgres.dead_letters": "error", "postgres.criticals": "warning"}
    assert "pinned" in found(report)["postgres.dead_letters"].message


def test_missing_tables_pending_migrations_and_changed_files_are_told(postgres_uri: str, redis_url: str) -> None:
    report = diagnose(postgres_uri, redis_url)
    assert serious(report) == {"postgres.tables": "error"}
    assert "migrate" in found(report)["postgres.tables"].advice
    with psycopg.connect(postgres_uri, autocommit=True) as conn:
        schema.setup(conn)
        conn.execute("DELETE FROM checkpointer_migrations WHERE version = 3")
        report = diagnose(postgres_uri, redis_url)
        assert serious(report) == {"postgres.migrations": "warning"}
        assert "0003_" in found(report)["postgres.migrations"].message
        conn.execute("UPDATE checkpointer_migrations SET checksum = 'other'")
        assert serious(diagnose(postgres_uri, redis_url)) == {"postgres.migrations": "error"}


def test_another_number_of_partitions_and_a_missing_right_are_told(
    saver: BufferedPostgresSaver, postgres_uri: str, redis_url: str, prefix: str
) -> None:
    report = diagnose(postgres_uri, redis_url, options=BufferOptions(prefix=prefix, partitions=8))
    assert serious(report) == {"postgres.partitions": "error"}
    assert "partitions=32" in found(report)["postgres.partitions"].advice
    with psycopg.connect(postgres_uri, autocommit=True) as conn:
        conn.execute("CREATE ROLE reader LOGIN")
        try:
            conn.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
            reader = make_conninfo(postgres_uri, options="-c role=reader")
            report = diagnose(reader, redis_url, options=saver.options)
            assert serious(report) == {"postgres.rights": "error"}
            assert "INSERT on checkpoint_blobs" in found(report)["postgres.rights"].message
        finally:
            conn.execute("DROP OWNED BY reader")
            conn.execute("DROP ROLE reader")


def test_a_redis_that_was_emptied_is_told(
    saver: BufferedPostgresSaver, postgres_uri: str, redis_url: str, prefix: str
) -> None:
    put_one(saver, "t")
    assert saver.flush()
    with redis.Redis.from_url(redis_url) as client:
        client.delete(*client.scan_iter(f"{prefix}:*"))
    assert serious(diagnose(postgres_uri, redis_url, options=saver.options)) == {"redis.rollback": "warning"}


def test_a_user_of_redis_who_may_not_run_the_scripts_is_told(
    saver: BufferedPostgresSaver, postgres_uri: str, redis_url: str, prefix: str
) -> None:
    limits: dict[str, dict[str, Any]] = {
        "scripts": {"keys": ["*"], "categories": ["+@all", "-@scripting"]},
        "keys": {"keys": ["elsewhere:*"], "categories": ["+@all"]},
    }
    with redis.Redis.from_url(redis_url) as client:
        for name, limit in limits.items():
            client.acl_setuser(f"{prefix}-{name}", enabled=True, nopass=True, reset=True, **limit)
        try:
            for name in limits:
                limited = redis_url.replace("redis://", f"redis://{prefix}-{name}:any@")
                report = diagnose(postgres_uri, limited, options=saver.options)
                assert serious(report) == {"redis.rights": "error"}
                assert prefix in found(report)["redis.rights"].advice
        finally:
            client.acl_deluser(*(f"{prefix}-{name}" for name in limits))


def test_clocks_apart_are_told(
    saver: BufferedPostgresSaver, postgres_uri: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ahead:
        time = staticmethod(lambda: time.time() + 5)

    monkeypatch.setattr(doctor, "time", Ahead)
    assert serious(diagnose(postgres_uri, redis_url, options=saver.options)) == {"clock.skew": "warning"}


# -- servers that do not answer --------------------------------------------------------------------------------------


def test_either_server_may_be_away_and_the_other_is_examined(
    saver: BufferedPostgresSaver, postgres_uri: str, redis_url: str
) -> None:
    nowhere = "127.0.0.1:1"
    report = diagnose(f"postgresql://me:secret@{nowhere}/db", redis_url, options=saver.options)
    assert serious(report) == {"postgres.unreachable": "error"}
    assert "redis.lag" in found(report)
    report = diagnose(postgres_uri, f"redis://me:secret@{nowhere}/0", options=saver.options)
    assert serious(report) == {"redis.unreachable": "error"}
    assert "postgres.threads" in found(report)
    report = diagnose(f"postgresql://me:secret@{nowhere}/db", f"redis://me:secret@{nowhere}/0")
    assert serious(report) == {"postgres.unreachable": "error", "redis.unreachable": "error"}
    assert "secret" not in str(report)


def test_paused_servers_cost_the_limit_and_no_more(own_servers: embedded.Servers) -> None:
    with BufferedPostgresSaver.from_conn_string(
        own_servers.postgres_uri, redis_url=own_servers.redis_url, **QUIET
    ) as made:
        made.setup()
        for server in (own_servers.postgres, own_servers.valkey):
            server.pause()
        begun = time.monotonic()
        report = diagnose(own_servers.postgres_uri, own_servers.redis_url, timeout=1.0)
        # Far below the minutes that a client of a stopped server waits.
        assert time.monotonic() - begun < 20
        assert not report
        assert {code.partition(".")[0] for code in serious(report)} == {"postgres", "redis"}
        for server in (own_servers.postgres, own_servers.valkey):
            server.resume()
        wait_until(lambda: serious(diagnose(own_servers.postgres_uri, own_servers.redis_url)) == {})


def test_a_server_that_stops_in_the_middle_is_let_go_with_what_it_had_said(
    own_servers: embedded.Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    with psycopg.connect(own_servers.postgres_uri, autocommit=True) as conn:
        schema.setup(conn)
    pending = schema.pending

    def pause(conn: psycopg.Connection[Any]) -> list[str]:
        names = pending(conn)
        own_servers.postgres.pause()
        return names

    monkeypatch.setattr(schema, "pending", pause)
    before = {thread.name for thread in threading.enumerate()}
    report = diagnose(own_servers.postgres_uri, own_servers.redis_url, timeout=2.0)
    assert serious(report) == {"postgres.no_answer": "error"}
    assert "postgres.migrations" in found(report)
    # The thread that waited for it has been woken, though the server still sleeps.
    wait_until(lambda: {thread.name for thread in threading.enumerate()} <= before)
    own_servers.postgres.resume()


@pytest.mark.parametrize(
    ("postgres", "code"),
    [
        (None, "postgres.address"),
        ("", "postgres.address"),
        ("postgres:/me:sesame@host", "postgres.address"),
        ("me:sesame@host", "postgres.address"),
        ("postgresql://me:ses%ame@host/db", "postgres.address"),
        ("postgresql://me:sesame@127.0.0.1:99999/db", "postgres.unreachable"),
        ("host=127.0.0.1 port=1 password=sesame dbname=x", "postgres.unreachable"),
        ("postgresql://me:open@sesame@127.0.0.1:1/db", "postgres.unreachable"),
    ],
)
def test_a_garbage_address_of_postgres_is_told_without_its_password(postgres: str | None, code: str) -> None:
    report = diagnose(postgres, "redis://127.0.0.1:1")
    assert serious(report)[code] == "error"
    assert "sesame" not in str(report)


@pytest.mark.parametrize(
    ("url", "code"),
    [
        (None, "redis.address"),
        ("http://me:sesame@host", "redis.address"),
        ("redis://me:ses@ame@host:port", "redis.address"),
        ("redis://me:sesame@127.0.0.1:1/0", "redis.unreachable"),
        ("rediss://127.0.0.1:1/0?password=sesame", "redis.unreachable"),
    ],
)
def test_a_garbage_address_of_redis_is_told_without_its_password(url: str | None, code: str) -> None:
    report = diagnose("postgresql://127.0.0.1:1/x", url)
    assert serious(report)[code] == "error"
    assert "sesame" not in str(report)


def test_a_wrong_password_or_database_is_told(postgres_uri: str, redis_url: str, prefix: str) -> None:
    wrong = make_conninfo(postgres_uri, dbname="not_there")
    assert serious(diagnose(wrong, redis_url))["postgres.login"] == "error"
    with redis.Redis.from_url(redis_url) as client:
        client.acl_setuser(prefix, enabled=True, passwords=["+right"], reset=True, categories=["+@all"], keys=["*"])
        try:
            report = diagnose(wrong, redis_url.replace("redis://", f"redis://{prefix}:sesame@"))
        finally:
            client.acl_deluser(prefix)
    assert serious(report)["redis.login"] == "error"
    assert "sesame" not in str(report)


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_what_to_do_and_its_exit_code_is_the_verdict(postgres_uri: str, redis_url: str) -> None:
    addresses = ["--postgres-uri", postgres_uri, "--redis-url", redis_url]
    done = run(*addresses)
    assert done.returncode == 1, done.stderr
    assert "error    The tables are missing." in done.stdout
    assert "-> Run `checkpointer migrate`" in done.stdout
    assert "1 errors" in done.stdout
    with psycopg.connect(postgres_uri, autocommit=True) as conn:
        schema.setup(conn)
        conn.execute("INSERT INTO system_errors (error_type, severity, error_message) VALUES ('e', 'critical', 'm')")
    done = run(POSTGRES_URI=postgres_uri, REDIS_URL=redis_url)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 warnings" in done.stdout
    assert run(*addresses, "--strict").returncode == 1


def test_the_command_prints_json_even_if_there_is_nothing_to_ask() -> None:
    done = run("--json", "--postgres-uri", "postgresql://me:sesame@127.0.0.1:1/db")
    assert (done.returncode, done.stderr) == (1, "")
    report = json.loads(done.stdout)
    assert (report["level"], report["healthy"]) == ("error", False)
    assert {"postgres.unreachable", "redis.address"} <= {finding["code"] for finding in report["findings"]}
    assert "sesame" not in done.stdout


@pytest.mark.parametrize("arguments", ["--prefix a:b", "--partitions 0", "--schema pg_x", "--timeout soon"])
def test_a_wrong_option_is_wrong_usage(monkeypatch: pytest.MonkeyPatch, arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["checkpointer", "doctor", *arguments.split()])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2


def test_reports_that_wait_in_redis_or_in_a_file_are_told(
    saver: BufferedPostgresSaver, postgres_uri: str, redis_url: str, prefix: str, tmp_path: Path
) -> None:
    os.environ["CHECKPOINTER_SPOOL_DIR"], before = str(tmp_path), os.environ["CHECKPOINTER_SPOOL_DIR"]
    try:
        Spool("one").append("system_errors", ["{}", "{}"])
        Spool("empty").append("system_errors", [])
    finally:
        os.environ["CHECKPOINTER_SPOOL_DIR"] = before
    (tmp_path / "broken.sqlite3").write_text("not a database")
    with redis.Redis.from_url(redis_url) as client:
        client.xadd(f"{prefix}:ev:errors", {"row": "{}"})
    done = run(
        "--json",
        *("--prefix", prefix),
        POSTGRES_URI=postgres_uri,
        REDIS_URL=redis_url,
        CHECKPOINTER_SPOOL_DIR=str(tmp_path),
    )
    assert done.returncode == 0, done.stdout
    said = [f["message"] for f in json.loads(done.stdout)["findings"] if f["level"] == "warning"]
    assert len(said) == 3
    assert any(message.startswith("1 error reports") and "Redis" in message for message in said)
    assert any(message.startswith("2 error reports") and "one.sqlite3" in message for message in said)
    assert any("broken.sqlite3 cannot be read" in message for message in said)
