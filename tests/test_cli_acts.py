"""What commands do, on real servers: acts with their audit, live views and their end, pipes, progress, completion."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from command_line import NOON, SCRIPT, Done, alone, command, plant_error, plant_line, running
from helpers import put_one, wait_until

import observability
from checkpointer.store import schema
from observability import queries

if TYPE_CHECKING:
    from collections.abc import Callable

    from savers import Recording

Connection = psycopg.Connection[Any]


@pytest.fixture
def store(conn: Connection) -> Connection:
    schema.setup(conn)
    return conn


@pytest.fixture
def errors(store: Connection, postgres_uri: str) -> Callable[..., Done]:
    return lambda *arguments: command("errors", *arguments, POSTGRES_URI=postgres_uri, COLUMNS="300")


def audit(conn: Connection) -> list[tuple[Any, ...]]:
    return conn.execute("SELECT action, actor, error_id, fingerprint FROM system_error_audit ORDER BY id").fetchall()


def ids(done: Done) -> list[int]:
    assert done.code == 0, done
    return [row["id"] for row in done.json()["errors"]]


# -- acts ------------------------------------------------------------------------------------------------------------


def test_resolve_keeps_who_and_why_and_says_once_more_that_nothing_changes(
    store: Connection, errors: Callable[..., Done]
) -> None:
    one, other = (plant_error(store, fingerprint=f"v1:{n}") for n in "ab")
    done = errors("resolve", one, "v1:b", 999, "v1:none", "--notes", "disk extended", "--by", "ann")
    assert done.code == 1, "two do not exist"
    assert done.out.splitlines() == [f"{one}: resolved", "v1:b: resolved"]
    assert "999" in done.err
    assert "v1:none" in done.err
    rows = store.execute("SELECT resolved_by, resolution_notes, resolved_at IS NULL FROM system_errors").fetchall()
    assert rows == [("ann", "disk extended", False)] * 2
    assert audit(store) == [("resolve", "ann", one, "v1:a"), ("resolve_group", "ann", None, "v1:b")]
    again = errors("resolve", one)
    assert (again.code, again.out) == (0, f"{one}: nothing to change\n")
    assert len(audit(store)) == 2
    assert ids(errors("list", "--json")) == []
    assert "disk extended" in errors("show", one).out
    assert errors("reopen", one, other).code == 0
    assert ids(errors("list", "--json")) == [other, one]
    assert [line[0] for line in audit(store)[2:]] == ["reopen", "reopen"]
    assert "@" in audit(store)[-1][1], "who runs it, if nobody is named"


def test_a_group_is_muted_by_one_of_its_errors_and_not_until_a_time_that_is_over(
    store: Connection, errors: Callable[..., Done]
) -> None:
    one = plant_error(store)
    assert errors("mute", one, "--until", "2020-01-01T00:00").code == 2
    assert errors("mute", one, "--until", "24h").code == 0
    assert [group["status"] for group in errors("groups", "--json").json()["groups"]] == ["muted"]
    until = store.execute("SELECT muted_until - now() FROM system_error_groups").fetchone()
    assert until
    assert 23 < until[0].total_seconds() / 3600 <= 24
    assert errors("unmute", "v1:a").out == "v1:a: unmuted\n"
    assert [group["status"] for group in errors("groups", "--json").json()["groups"]] == ["unresolved"]


def test_deleting_only_counts_until_it_is_told_to_do_it(store: Connection, errors: Callable[..., Done]) -> None:
    old, new, unresolved = (plant_error(store) for _ in range(3))
    store.execute("UPDATE system_errors SET resolved_at = now() - interval '40 days' WHERE id = %s", (old,))
    store.execute("UPDATE system_errors SET resolved_at = now() WHERE id = %s", (new,))
    for neither_or_both in ([], [old, "--resolved-before", "30d"]):
        assert errors("delete", *neither_or_both).code == 2
    dry = errors("delete", "--resolved-before", "30d")
    assert (dry.code, dry.out) == (0, "1 errors would be deleted: do it with --yes.\n")
    assert errors("delete", unresolved).code == 0
    assert ids(errors("list", "--state", "all", "--json")) == [unresolved, new, old]
    done = errors("delete", "--resolved-before", "30d", "--yes", "--json")
    assert done.json() == {"count": 1, "more": False, "deleted": True}
    assert ids(errors("list", "--state", "all", "--json")) == [unresolved, new]
    assert errors("delete", unresolved, 999, "--yes").code == 1
    assert ids(errors("list", "--state", "all", "--json")) == [new]


def test_filters_and_pages_of_errors(store: Connection, errors: Callable[..., Done]) -> None:
    one = plant_error(store, severity="critical", thread_id="t", component="flusher", error_message="Disk full")
    two = plant_error(store, error_type="other", fingerprint="v1:b", occurrences=3)
    for narrowing in (
        ["--severity", "critical"],
        *(["--thread", "t"], ["--component", "flusher"], ["--text", "disk"], ["--group", "v1:a"]),
        ["--type", "checkpoint_flush_error"],
    ):
        assert ids(errors("list", *narrowing, "--json")) == [one], narrowing
    assert ids(errors("list", "--since", "1h", "--json")) == []
    assert ids(errors("list", "--until", "1h", "--json")) == [two, one]
    assert ids(errors("list", "--since", "2026-03-14T12:00", "--json")) == [two, one]
    first = errors("list", "--limit", 1, "--json").json()
    assert ids(errors("list", "--limit", 1, "--json", "--cursor", first["next_cursor"])) == [one]
    assert f"--cursor {first['next_cursor']}" in errors("list", "--limit", 1).err
    assert "(x3)" in errors("list").out
    for wrong in (["--limit", 0], ["--severity", "fatal"], ["--since", "yesterday"]):
        assert errors("list", *wrong).code == 2, wrong
    errors("list", "--cursor", "forged").failed()
    errors("show", 999).failed()
    assert errors("stats", "--json").json()["unresolved"] == 4


def test_flush_brings_one_thread_or_all_to_postgres(
    make: Callable[..., Recording], postgres_uri: str, redis_url: str, prefix: str, conn: Connection
) -> None:
    saver = make()
    for thread in "abc":
        put_one(saver, thread)
    environment = {"POSTGRES_URI": postgres_uri, "REDIS_URL": redis_url, "CHECKPOINTER_PREFIX": prefix}
    assert command("flush", "a", **environment).code == 0
    assert conn.execute("SELECT thread_id FROM checkpoints").fetchall() == [("a",)]
    found = command("threads", "list", "--json", **environment).json()["threads"]
    assert [(row["thread_id"], row["where"]) for row in found] == [("a", "postgres"), ("b", "redis"), ("c", "redis")]
    document = command("flush", "--json", **environment).json()
    assert (document["flushed"], document["threads"], document["checkpoints"]) == (True, 2, 2)
    assert conn.execute("SELECT count(*) FROM checkpoints").fetchone() == (3,)
    assert command("flush", **environment).out == "Nothing was waiting.\n"
    assert "no-such" in command("flush", "--prefix", "no-such", **environment).failed()
    away = environment | {"REDIS_URL": "redis://me:hunter2@127.0.0.1:1"}
    line = command("flush", **away).failed()
    assert line.startswith("Nothing could be flushed: Redis cannot be reached.")
    listed = command("threads", "list", **away)
    assert listed.code == 0
    assert "Redis cannot be asked" in listed.err
    assert "hunter2" not in line + listed.err
    assert "no thread 'nobody'" in command("threads", "show", "nobody", **environment).failed()


def test_a_redis_that_is_gone_is_given_up_only_when_told_to(
    make: Callable[..., Recording], postgres_uri: str, prefix: str, conn: Connection
) -> None:
    put_one(make(), "t")
    arguments = ("buffer", "abandon", "--prefix", prefix, "--postgres-uri", postgres_uri)
    assert command(*arguments, "--json").json() == {"threads": ["t"], "abandoned": False}
    assert command(*arguments, "--json").json()["threads"] == ["t"]
    assert command(*arguments, "--yes").out == "t\n1 threads were given up.\n"
    assert command(*arguments, "--json").json()["threads"] == []
    assert conn.execute("SELECT severity, thread_id FROM system_errors").fetchall() == [("critical", "t")]


def test_with_postgres_away_a_log_is_read_from_redis(
    make: Callable[..., Recording], redis_url: str, postgres_uri: str, prefix: str
) -> None:
    make(hooks=("thread_log",))
    observability.emit_log("Refund started", thread_id="t", level="info")
    there = {"REDIS_URL": redis_url, "CHECKPOINTER_PREFIX": prefix}
    wait_until(lambda: command("logs", "t", POSTGRES_URI=postgres_uri, **there).out)
    done = command("logs", "t", POSTGRES_URI="postgresql://me:hunter2@127.0.0.1:1/db", **there)
    assert done.code == 0
    assert "Refund started" in done.out
    assert "Only what Redis has" in done.err
    assert "hunter2" not in done.err


def test_pages_of_a_log(store: Connection, postgres_uri: str) -> None:
    for n in range(3):
        plant_line(store, "t", f"line {n}")
    there = {"POSTGRES_URI": postgres_uri}
    last = command("logs", "t", "-n", 2, "--json", **there).json()
    assert [line["message"] for line in last["lines"]] == ["line 1", "line 2"]
    before = command("logs", "t", "--cursor", last["next_cursor"], **there)
    assert [line.split("  ")[-1] for line in before.out.splitlines()] == ["line 0"]
    assert command("logs", "t", "--lines", 0, **there).code == 2
    assert command("logs", "t", "-f", "--cursor", "x", **there).code == 2


def test_a_query_takes_its_parameters_and_no_others(store: Connection, postgres_uri: str) -> None:
    for _ in range(2):
        plant_error(store, thread_id="t")
    name = "threads_with_several_unresolved"
    for number, rows in ((1, 1), (2, 0)):
        done = command("queries", "run", name, "--param", f"more_than={number}", "--json", POSTGRES_URI=postgres_uri)
        assert len(done.json()) == rows
    for wrong in ("more_than", "less_than=1"):
        assert command("queries", "run", name, "--param", wrong, POSTGRES_URI=postgres_uri).code == 2


def test_the_tables_of_a_tenant_are_its_own(postgres_uri: str, conn: Connection) -> None:
    there = {"POSTGRES_URI": postgres_uri, "CHECKPOINTER_SCHEMA": "tenant"}
    assert command("migrate", **there).code == 0
    assert command("errors", "list", "--json", **there).json()["count"] == 0
    assert conn.execute("SELECT schemaname FROM pg_tables WHERE tablename = 'system_errors'").fetchall() == [
        ("tenant",)
    ]
    assert "checkpointer migrate" in command("errors", "list", POSTGRES_URI=postgres_uri).failed()


# -- live ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_json", [True, False])
def test_errors_are_shown_as_they_arrive_until_ctrl_c(store: Connection, postgres_uri: str, as_json: bool) -> None:
    plant_error(store, error_message="before")
    arguments = ["--json"] if as_json else []
    with running("errors", "tail", "--severity", "error", *arguments, POSTGRES_URI=postgres_uri) as tail:
        tail.line_with("before")
        plant_error(store, error_message="unasked", severity="info")
        plant_error(store, error_message="arrived")
        line = tail.line_with("arrived")
        assert tail.ended(signal.SIGINT) == 130
    assert tail.err == []
    assert len(tail.out) == 2
    if as_json:
        assert json.loads(line)["error_message"] == "arrived"


def test_a_log_is_followed_until_ctrl_c(store: Connection, postgres_uri: str) -> None:
    plant_line(store, "t", "before")
    with running("logs", "t", "--follow", "--json", POSTGRES_URI=postgres_uri) as log:
        log.line_with("before")
        plant_line(store, "other", "unasked")
        plant_line(store, "t", "arrived")
        assert json.loads(log.line_with("arrived"))["created_at"] == NOON.isoformat()
        assert log.ended(signal.SIGINT) == 130
    assert log.err == []
    assert len(log.out) == 2


def test_a_port_that_is_taken_is_a_failure_that_says_so(store: Connection, postgres_uri: str) -> None:
    with running("serve", "--port", 0, "--json", POSTGRES_URI=postgres_uri) as first:
        port = json.loads(first.line_with("url"))["url"].rpartition(":")[2]
        with running("serve", "--port", port, POSTGRES_URI=postgres_uri) as second:
            assert second.ended() == 1
        assert f"127.0.0.1:{port} cannot be listened on" in second.err[-1]
        assert first.ended(signal.SIGTERM) == 0


# -- pipes and terminals ---------------------------------------------------------------------------------------------


def start(*arguments: str, **streams: Any) -> subprocess.Popen[str]:
    environment = streams.pop("environment", {})
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments], text=True, env=alone(environment), **streams)


@pytest.mark.parametrize("many", [True, False])
def test_a_reader_that_reads_no_more_is_no_traceback(store: Connection, postgres_uri: str, many: bool) -> None:
    for _ in range(200 if many else 1):
        plant_error(store, error_message="x" * 1000)
    reading, writing = os.pipe()
    os.close(reading)
    process = start(
        *("errors", "list", "--limit", "200", "--json"),
        stdout=writing,
        stderr=subprocess.PIPE,
        environment={"POSTGRES_URI": postgres_uri},
    )
    os.close(writing)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 1


@pytest.mark.parametrize("as_json", [True, False])
def test_a_full_disk_is_one_line(as_json: bool) -> None:
    with Path("/dev/full").open("w") as full:
        process = start("queries", "list", *(["--json"] if as_json else []), stdout=full, stderr=subprocess.PIPE)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "No space left on device" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(("as_json", "shown"), [(False, True), (True, False)])
def test_progress_is_shown_on_a_terminal_alone_and_not_beside_json(
    postgres_uri: str, as_json: bool, shown: bool
) -> None:
    ours, theirs = pty.openpty()
    process = start(
        "migrate",
        *(["--json"] if as_json else []),
        stdout=subprocess.PIPE,
        stderr=theirs,
        environment={"POSTGRES_URI": postgres_uri, "TERM": "xterm", "COLUMNS": "80"},
    )
    os.close(theirs)
    out = process.communicate(timeout=60)[0]
    said = b""
    try:
        while part := os.read(ours, 65_536):
            said += part
    except OSError:  # how a terminal ends whose other side is closed
        pass
    os.close(ours)
    assert process.returncode == 0
    assert (b"Migrating" in said) is shown
    assert "Migrating" not in out
    if as_json:
        assert json.loads(out)["applied"]
        assert said == b""


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("checkpointer dead-", ["dead-letters"]),
        ("checkpointer errors re", ["reopen", "resolve"]),
        ("checkpointer errors list --sta", ["--state"]),
        ("checkpointer queries run ", queries.names()),
        ("checkpointer query unres", ["unresolved_criticals"]),
    ],
)
def test_the_shell_completes_commands_options_and_names_of_queries(words: str, offered: list[str]) -> None:
    environment = {
        "_CHECKPOINTER_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    process = start(stdout=subprocess.PIPE, environment=environment)
    assert sorted(process.communicate(timeout=60)[0].split()) == sorted(offered)


def test_the_completion_of_a_shell_can_be_printed() -> None:
    process = start(stdout=subprocess.PIPE, environment={"_CHECKPOINTER_COMPLETE": "source_bash"})
    assert "_CHECKPOINTER_COMPLETE=complete_bash" in process.communicate(timeout=60)[0]
