"""What holds for every command, made of the tree of commands so that a new one cannot be forgotten."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest
import redis
from command_line import HOSTILE, Done, command, obeyed, plant_error, plant_line, running, takes, tree
from helpers import put_one, with_database
from poisoning import forbid, put_steps

import observability
from checkpointer import BufferedPostgresSaver
from checkpointer.hooks import STANDARD_HOOKS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Addresses

COMMANDS = tree()
# They run until they are told to end; with a word of what they say first.
LASTING = {"worker": "Flushing", "serve": "running on", "errors tail": "a\\", "demo": "Starting"}
# So much that no cell is folded.
WIDE = "1000"
NO_PASSWORD = ("hunter2", "hunter3")


@dataclass
class World:
    """An application with hostile ids and texts wherever an application or its users can put some."""

    postgres_uri: str
    redis_url: str
    prefix: str
    errors: list[int]
    letters: list[int]

    @property
    def environment(self) -> dict[str, str]:
        return {
            "POSTGRES_URI": self.postgres_uri,
            "REDIS_URL": self.redis_url,
            "CHECKPOINTER_PREFIX": self.prefix,
            "COLUMNS": WIDE,
        }

    def run(self, *arguments: object, **environment: str) -> Done:
        return command(*arguments, **self.environment | environment)


@pytest.fixture(scope="module")
def world(servers: Addresses) -> Iterator[World]:
    name, prefix = f"test_{uuid4().hex}", f"t{uuid4().hex[:12]}"
    uri = with_database(servers.postgres_uri, name)
    with psycopg.connect(servers.postgres_uri, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'".encode())
        with psycopg.connect(uri, autocommit=True) as conn:
            yield _fill(conn, uri, servers.redis_url, prefix)
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())
    with redis.Redis.from_url(servers.redis_url) as client:
        for key in client.scan_iter(f"{prefix}:*", count=1000):
            client.unlink(key)


def _fill(conn: psycopg.Connection[Any], uri: str, redis_url: str, prefix: str) -> World:
    with BufferedPostgresSaver.from_conn_string(
        uri, redis_url=redis_url, prefix=prefix, triggers=frozenset(), hooks=tuple(set(STANDARD_HOOKS) - {"console"})
    ) as saver:
        saver.setup()
        put_one(saver, HOSTILE)
        saver.flush()
        forbid(conn)
        for thread in (f"{HOSTILE}1", f"{HOSTILE}2"):
            put_steps(saver, thread, 1, {0: "checkpoint"})
        saver.flush()
        letters = [letter.id for letter in saver.dead_letters.list()]
        put_one(saver, HOSTILE, "more")
        observability.emit_log(HOSTILE, thread_id=HOSTILE, level="info")
    conn.execute("UPDATE checkpoint_dead_letters SET error_message = %s", (HOSTILE,))
    hostile = {"error_type": HOSTILE, "error_message": HOSTILE, "thread_id": HOSTILE, "stack_trace": HOSTILE}
    hostile |= {"error_context": json.dumps({HOSTILE: HOSTILE}), "component": HOSTILE}
    errors = [plant_error(conn, **hostile, fingerprint=f"v1:{n}") for n in range(8)]
    plant_line(conn, HOSTILE, HOSTILE)
    world = World(uri, redis_url, prefix, errors, letters)
    assert world.run("errors", "resolve", errors[7], "--notes", HOSTILE, "--by", HOSTILE).code == 0
    assert world.run("tokens", "create", HOSTILE).code == 0
    return world


def arguments_for(name: str, world: World) -> tuple[list[object], int]:
    """Return what to give a command, and with what it then exits."""
    error, letter = world.errors, world.letters
    given: dict[str, tuple[list[object], int]] = {
        "migrate": ([], 0),
        "query": (["unresolved_criticals"], 0),
        "doctor": ([], 1),  # the records that Postgres refuses
        "worker": (["--drain-timeout", 0], 1),
        "serve": (["--port", 0], 0),
        "demo": (["--no-open"], 0),
        "flush": ([], 1),
        "logs": ([HOSTILE], 0),
        "buffer abandon": ([], 0),
        "errors list": (["--state", "all"], 0),
        "errors groups": ([], 0),
        "errors show": ([error[7]], 0),
        "errors resolve": ([error[0], "v1:1", "--notes", HOSTILE, "--by", HOSTILE], 0),
        "errors reopen": ([error[2]], 0),
        "errors mute": ([error[3], "v1:4"], 0),
        "errors unmute": ([error[5]], 0),
        "errors delete": ([error[6]], 0),
        "errors stats": ([], 0),
        "errors trends": (["--since", "2026-03-14T00:00", "--until", "2026-03-15T00:00", "--by", "error_type"], 0),
        "errors tail": ([], 130),
        "threads list": ([], 0),
        "threads show": ([HOSTILE], 0),
        "queries list": ([], 0),
        "queries run": (["threads_with_several_unresolved"], 0),
        "dead-letters list": ([], 0),
        "dead-letters show": ([letter[0]], 0),
        "dead-letters replay": ([letter[0]], 1),
        "dead-letters drop": ([letter[1]], 0),
        "tokens create": (["ann"], 0),
        "tokens list": ([], 0),
        "tokens revoke": ([world.run("tokens", "list", "--json").json()[0]["id"]], 0),
    }
    assert name in given, f"say here how `checkpointer {name}` is run, so that it is tested as the others are"
    return given[name]


# Where the hostile text is part of what is asked for.
SHOWS_HOSTILE = {
    *("buffer abandon", "errors list", "errors groups", "errors show", "errors stats", "errors tail", "errors resolve"),
    *("logs", "threads list", "threads show", "queries run"),
    *("dead-letters list", "dead-letters show", "dead-letters replay", "dead-letters drop", "tokens list"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_one_json_document_when_asked_to(name: str, world: World) -> None:
    assert takes(COMMANDS[name], "--json"), "--json is on every command"
    arguments, code = arguments_for(name, world)
    if name not in LASTING:
        done = world.run(*name.split(), *arguments, "--json")
        assert done.code == code, done
        document = done.json()
        assert isinstance(document, dict | list)
        if name in SHOWS_HOSTILE - {"errors stats"}:
            assert any(HOSTILE in one for one in strings(document)), "as it is, in JSON"
        return
    with running(*name.split(), *arguments, "--json", **world.environment) as process:
        process.line_with(LASTING[name])
        assert process.ended(signal.SIGINT) == code, process.err
    assert not obeyed("".join(process.out))
    if name == "errors tail":
        assert HOSTILE in strings([json.loads(line) for line in process.out])
    elif name == "demo":
        assert {frozenset(json.loads(line)) for line in process.out} == {frozenset({"kind", "text"})}
    else:
        assert isinstance(json.loads("".join(process.out)), dict)


@pytest.mark.parametrize("name", COMMANDS)
def test_hostile_text_does_not_steer_the_terminal(name: str, world: World) -> None:
    arguments, code = arguments_for(name, world)
    if name in LASTING:
        with running(*name.split(), *arguments, **world.environment) as process:
            process.line_with(LASTING[name])
            assert process.ended(signal.SIGINT) == code, process.err
        out, err = "".join(process.out), "".join(process.err)
    else:
        done = world.run(*name.split(), *arguments)
        assert done.code == code, done
        out, err = done.out, done.err
    assert not obeyed(out + err)
    if name in SHOWS_HOSTILE - {"queries run", "errors resolve"}:
        assert "[bold]c[/bold]" in out, "shown, and not taken for markup"
        assert "a\\x1b[31m\\x9b2J\\u202eb\\r\\x07\\x7f" in out


REACHING = [name for name, found in COMMANDS.items() if takes(found, "--postgres-uri") and name != "serve"]


@pytest.mark.parametrize("name", REACHING)
def test_with_both_servers_away_every_command_says_so_without_their_passwords(name: str, world: World) -> None:
    arguments, _ = arguments_for(name, world)
    away = {"POSTGRES_URI": "postgresql://me:hunter2@127.0.0.1:1/db", "REDIS_URL": "redis://me:hunter3@127.0.0.1:1"}
    done = world.run(*name.split(), *arguments, **away)
    said = done.out + done.err
    if name == "doctor":
        assert done.code == 1
        assert "Redis cannot be reached" in said
    else:
        assert done.failed(1) == done.err
        assert done.out == ""
    assert "Postgres cannot be reached" in said
    assert not [one for one in NO_PASSWORD if one in said]


@pytest.mark.parametrize("name", [*REACHING, "serve"])
@pytest.mark.parametrize("uri", ["postgres:/me:hunter2@host", "host=x password=hunter2 foo=1", ""])
def test_an_address_that_is_none_is_one_line_without_its_password(name: str, uri: str, world: World) -> None:
    arguments, _ = arguments_for(name, world)
    done = world.run(*name.split(), *arguments, "--postgres-uri", uri, REDIS_URL="redis://me:hunter3@127.0.0.1:1")
    if name == "doctor":
        assert done.code == 1
    else:
        assert "POSTGRES_URI" in done.failed(1)
    assert not [one for one in NO_PASSWORD if one in done.out + done.err]


@pytest.mark.parametrize("name", [name for name, found in COMMANDS.items() if takes(found, "--schema")])
def test_a_schema_that_cannot_be_one_is_one_line(name: str, world: World) -> None:
    arguments, _ = arguments_for(name, world)
    done = world.run(*name.split(), *arguments, "--schema", "pg_mine")
    assert done.code in (1, 2)
    assert done.out == ""
    assert "begins with 'pg_'" in " ".join(done.err.replace("│", "").split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_and_each_of_its_options(name: str) -> None:
    done = command(*name.split(), "--help", COLUMNS=WIDE)
    assert (done.code, done.err) == (0, "")
    for param in COMMANDS[name].params:
        assert getattr(param, "help", None), f"{param.name} is not explained"
        if param.param_type_name == "option":
            assert param.opts[0] in done.out


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_usage_exits_with_2_and_does_nothing(name: str) -> None:
    for wrong in ("--nonsense", "--json=maybe"):
        done = command(*name.split(), wrong, COLUMNS=WIDE)
        assert (done.code, done.out) == (2, ""), done
        assert wrong.partition("=")[0] in done.err


def strings(document: Any) -> set[str]:
    """Return all texts of a JSON document."""
    if isinstance(document, str):
        return {document}
    each = [*document.values(), *document] if isinstance(document, dict) else document
    return set().union(*map(strings, each)) if isinstance(document, dict | list) else set()
