"""`checkpointer serve` and `checkpointer tokens` as processes of their own, and one failure from cause to end."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypedDict

import httpx
import pytest
from helpers import wait_until
from langgraph.graph import END, START, StateGraph
from planting import plant
from test_streams import connected, event

from checkpointer import BufferedPostgresSaver, NonFiniteValueError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import psycopg
    from langgraph.graph.state import CompiledStateGraph

    Connection = psycopg.Connection[Any]
    Command = Callable[..., subprocess.CompletedProcess[str]]

ADMIN = "an-administrators-token"
ERRORS = "/admin/system-errors"
RUN = "from checkpointer.cli import main; main()"


@pytest.fixture
def environment(api_uri: str, redis_url: str, prefix: str, spool_dir: Path) -> dict[str, str]:
    return os.environ | {
        "POSTGRES_URI": api_uri,
        "REDIS_URL": redis_url,
        "CHECKPOINTER_PREFIX": prefix,
        "CHECKPOINTER_ADMIN_TOKEN": ADMIN,
        "NO_COLOR": "1",
    }


@pytest.fixture
def command(environment: dict[str, str]) -> Command:
    def run(*arguments: str, script: str = RUN, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", script, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env=environment | more,
        )

    return run


@dataclass
class Serving:
    """A process that serves.

    Attributes:
        url: Where.
        process: It has its log in `logged`.
        logged: The lines so far.
    """

    url: str
    process: subprocess.Popen[str]
    logged: list[str]


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Callable[..., Serving]]:
    with contextlib.ExitStack() as stack:

        def begin(*arguments: str, **more: str) -> Serving:
            process = subprocess.Popen(
                [sys.executable, "-c", RUN, "serve", "--port", "0", *arguments],
                stderr=subprocess.PIPE,
                text=True,
                env=environment | more,
            )
            logged: list[str] = []

            def read() -> None:
                assert process.stderr is not None
                logged.extend(iter(process.stderr.readline, ""))

            reader = threading.Thread(target=read)
            reader.start()
            stack.callback(reader.join, 60)
            stack.callback(process.wait, 60)
            stack.callback(process.kill)

            def address() -> str | None:
                assert process.poll() is None, logged
                found = re.search(r"running on (http://\S+)", "".join(logged))
                return found and found[1]

            return Serving(wait_until(address) or "", process, logged)

        yield begin


def test_a_token_is_made_used_listed_and_revoked(command: Command, start: Callable[..., Serving]) -> None:
    made = command("tokens", "create", "ann", "--scope", "read", "--scope", "resolve", "--days", "2")
    assert (made.returncode, made.stderr) == (0, "")
    token = made.stdout.strip()
    (row,) = json.loads(command("tokens", "list", "--json").stdout)
    assert (row["name"], row["scopes"], row["id"]) == ("ann", ["read", "resolve"], token.split("_")[1])
    assert timedelta(days=1) < datetime.fromisoformat(row["expires_at"]) - datetime.now(UTC) < timedelta(days=2)
    assert token[-43:] not in command("tokens", "list").stdout
    lasting = command("tokens", "create", "bob", "--never-expires").stdout.strip()
    assert json.loads(command("tokens", "list", "--json").stdout)[0]["expires_at"] is None
    served = start()
    for one in (token, lasting, ADMIN):
        answer = httpx.get(f"{served.url}{ERRORS}", headers={"Authorization": f"Bearer {one}"}, timeout=60)
        assert answer.status_code == 200, answer.text
    for _ in range(2):
        assert "ann" in command("tokens", "revoke", row["id"]).stdout
    gone = httpx.get(f"{served.url}{ERRORS}", headers={"Authorization": f"Bearer {token}"}, timeout=60)
    assert gone.status_code == 401
    audit = httpx.get(f"{served.url}{ERRORS}/audit", headers={"Authorization": f"Bearer {ADMIN}"}, timeout=60).json()
    lines = [line for line in audit["entries"] if line["action"] != "refuse"]
    assert [line["action"] for line in lines] == ["token_revoke", "token_create", "token_create"]
    assert all(line["details"]["how"] == {"way": "command line"} for line in lines)


@pytest.mark.parametrize(
    ("arguments", "changes", "said"),
    [
        (["tokens", "create", "ann", "--scope", "everything"], {}, "unknown scopes 'everything'"),
        (["tokens", "create", " "], {}, "no name"),
        (["tokens", "revoke", "nothing"], {}, "no token with the id"),
        (["serve"], {"POSTGRES_URI": ""}, "POSTGRES_URI"),
        (["serve"], {"POSTGRES_URI": "postgres:/me:hunter2@host"}, "connection string"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    command: Command, arguments: list[str], changes: dict[str, str], said: str
) -> None:
    done = command(*arguments, **changes)
    assert done.returncode == 1, done.stdout + done.stderr
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert "hunter2" not in done.stderr


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn"])
def test_without_the_extra_it_says_what_to_install(command: Command, missing: str) -> None:
    done = command("serve", script=f"import sys; sys.modules[{missing!r}] = None; {RUN}")
    assert done.returncode == 1
    assert 'pip install "langgraph-checkpoint-buffered[api]"' in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_by_a_signal_also_while_streams_are_open_and_has_logged_no_secret(
    start: Callable[..., Serving], conn: Connection, number: signal.Signals
) -> None:
    served = start()
    headers = {"Authorization": f"Bearer {ADMIN}"}
    with httpx.Client(base_url=served.url, timeout=60) as client:
        assert client.get("/readyz").json() == {"status": "ok", "postgres": "ok", "redis": "ok"}
        assert "python_info" in client.get("/metrics", headers=headers).text
        client.get(ERRORS, headers={"Authorization": "Bearer guessed-token"})
        url = client.post(f"{ERRORS}/events/ticket", headers=headers).json()["url"]
        with client.stream("GET", url) as response:
            lines = connected(response.iter_lines())
            planted = plant(conn)
            assert event(lines)["data"]["id"] == planted
            served.process.send_signal(number)
            for _ in lines:
                pass
    assert served.process.wait(60) == 0
    text = "".join(served.logged)
    for secret in (ADMIN, "guessed-token", url, url.partition("ticket=")[2]):
        assert secret not in text


def test_without_a_ready_token_it_says_so(start: Callable[..., Serving]) -> None:
    served = start(CHECKPOINTER_ADMIN_TOKEN="")
    assert any("CHECKPOINTER_ADMIN_TOKEN is not set" in line for line in served.logged)
    answer = httpx.get(f"{served.url}{ERRORS}", headers={"Authorization": "Bearer None"}, timeout=60)
    assert answer.status_code == 401


@pytest.mark.parametrize(("proxies", "client"), [((), "127.0.0.1"), (("--proxies", "127.0.0.1"), "203.0.113.9")])
def test_the_address_of_a_client_is_a_proxys_word_only_if_the_proxy_is_trusted(
    start: Callable[..., Serving], proxies: tuple[str, ...], client: str
) -> None:
    served = start(*proxies)
    httpx.get(f"{served.url}{ERRORS}", headers={"X-Forwarded-For": "203.0.113.9"}, timeout=60)
    audit = httpx.get(f"{served.url}{ERRORS}/audit", headers={"Authorization": f"Bearer {ADMIN}"}, timeout=60).json()
    assert [line["details"]["client"] for line in audit["entries"]] == [client]


class State(TypedDict, total=False):
    score: float


def graph(saver: BufferedPostgresSaver) -> CompiledStateGraph[State, None, State, State]:
    builder = StateGraph(State)
    builder.add_node("rate", lambda state: {"score": math.nan})
    builder.add_edge(START, "rate")
    builder.add_edge("rate", END)
    return builder.compile(checkpointer=saver)


def test_a_failure_is_seen_by_its_user_and_its_administrator_and_resolved_without_a_shell(
    command: Command, start: Callable[..., Serving], api_uri: str, redis_url: str, prefix: str
) -> None:
    served = start()
    token = command("tokens", "create", "ann", "--scope", "read", "--scope", "resolve").stdout.strip()
    ann = {"Authorization": f"Bearer {token}"}
    began = datetime.now(UTC)
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(httpx.Client(base_url=served.url, timeout=60))

        def watch(path: str, **options: Any) -> Iterator[str]:
            return connected(stack.enter_context(client.stream("GET", path, **options)).iter_lines())

        # The user's browser and the administrator's are open while the run goes on.
        ticket = client.post("/threads/chat-1/events/ticket", headers=ann).json()
        browser, console = watch(ticket["url"]), watch(f"{ERRORS}/events", headers=ann)
        for thread_id, rule in (("chat-0", "null"), ("chat-1", "raise")):
            saver = stack.enter_context(
                BufferedPostgresSaver.from_conn_string(
                    api_uri, redis_url=redis_url, prefix=prefix, non_finite=rule, triggers=frozenset()
                )
            )
            config: Any = {"configurable": {"thread_id": thread_id}}
            if rule == "raise":
                with pytest.raises(NonFiniteValueError):
                    graph(saver).invoke({"score": 1.0}, config, durability="sync")
            else:
                graph(saver).invoke({"score": 1.0}, config, durability="sync")

        # The user is told in words of their own, as it happens and in the log.
        seen = event(browser)["data"]
        assert (seen["type"], seen["severity"], seen["thread_id"]) == ("checkpoint_refused", "critical", "chat-1")
        assert seen["message"].startswith("A value in this conversation cannot be stored")
        assert "NonFinite" not in json.dumps(seen)
        log = wait_until(lambda: client.get("/threads/chat-1/logs", headers=ann).json()["lines"])
        assert log[0]["message"].startswith("A value in this conversation cannot be stored")

        # The administrator sees both kinds arrive, and asks for the worse ones.
        arrived: list[dict[str, Any]] = []
        while {error["severity"] for error in arrived} != {"warning", "critical"}:
            arrived.append(event(console)["data"])
        assert {error["thread_id"] for error in arrived if error["severity"] == "warning"} == {"chat-0"}
        critical = client.get(ERRORS, params={"severity": "critical"}, headers=ann).json()["errors"]
        assert {error["thread_id"] for error in critical} == {"chat-1"}
        error_id = critical[-1]["id"]
        assert client.get(f"{ERRORS}/{error_id}", headers=ann).json()["error"]["stack_trace"] is None
        whole = client.get(f"{ERRORS}/{error_id}", headers={"Authorization": f"Bearer {ADMIN}"}).json()["error"]
        assert "NonFiniteValueError" in whole["stack_trace"]
        assert "score" in whole["error_message"]
        assert "checkpoint_count" in whole["error_context"]

        # It is resolved, and the audit says by whom, when and how.
        notes = "The rating divides by nothing now and then: fixed in the node."
        for error in critical:
            done = client.post(f"{ERRORS}/{error['id']}/resolve", json={"resolution_notes": notes}, headers=ann).json()
            assert (done["changed"], done["resolved_by"], done["resolution_notes"]) == (True, "ann", notes)
        assert client.get(ERRORS, params={"severity": "critical"}, headers=ann).json()["count"] == 0
        audit = client.get(f"{ERRORS}/audit", params={"error_id": error_id}, headers=ann).json()["entries"]
        assert [(line["action"], line["actor"], line["details"]["notes"]) for line in audit] == [
            ("resolve", "ann", notes)
        ]
        assert audit[0]["details"]["how"] == {
            "way": "http",
            "client": "127.0.0.1",
            "with": f"token {token.split('_')[1]}",
        }
        assert began <= datetime.fromisoformat(audit[0]["at"]) <= datetime.now(UTC)
