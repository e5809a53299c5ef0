"""The example of a team: what a person has to approve waits for the answer, whatever becomes of the process."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
from example_processes import ROOT, arguments, clean, commands
from helpers import wait_until
from langgraph.checkpoint.postgres import PostgresSaver

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Addresses

PAID, SENT = "*** 30.00 EUR are paid back", "*** the letter is sent: your money is on its way"


@pytest.fixture
def with_servers(servers: Addresses, postgres_uri: str) -> dict[str, str]:
    return {"POSTGRES_URI": postgres_uri, "REDIS_URL": servers.redis_url}


def run(command: str, *more: str, **environment: str) -> str:
    """Run a command of the README without a terminal, and return what it printed."""
    done = subprocess.run(
        arguments(command, *more),
        cwd=ROOT,
        env=clean(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Terminal:
    """A command at a terminal."""

    def __init__(self, command: str, *more: str, **environment: str) -> None:
        self._ours, theirs = pty.openpty()
        os.set_blocking(self._ours, False)
        self._said = b""
        self._process = subprocess.Popen(
            arguments(command, *more), cwd=ROOT, env=clean(environment), stdin=theirs, stdout=theirs, stderr=theirs
        )
        os.close(theirs)

    @property
    def said(self) -> str:
        try:
            while piece := os.read(self._ours, 65_536):
                self._said += piece
        except (BlockingIOError, OSError):  # nothing more now, or never again
            pass
        return self._said.decode()

    def wait_for(self, text: str, count: int = 1) -> None:
        wait_until(
            lambda: self.said.count(text) >= count or self._process.poll() is not None,
            timeout=90,
            message=f"{text!r} is printed",
        )
        assert self.said.count(text) >= count, self.said

    def type(self, line: str) -> None:
        os.write(self._ours, f"{line}\n".encode())

    def ended(self) -> int:
        return self._process.wait(90)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(90)

    def close(self) -> None:
        if self._process.poll() is None:
            self.kill()
        os.close(self._ours)


@contextmanager
def terminal(command: str, *more: str, **environment: str) -> Iterator[Terminal]:
    """Run a command of the README at a terminal."""
    opened = Terminal(command, *more, **environment)
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that the user of the private servers can enter too."""
    folder = Path(tempfile.mkdtemp(prefix="checkpointer-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_a_case_waits_for_a_person_and_goes_on_in_another_process(with_servers: dict[str, str]) -> None:
    begin, go_on, _ = commands("supervisor")
    first = run(begin, **with_servers)
    assert first.startswith("case-1 begins.\n")
    assert "researcher: Order 42 of Ines, 30.00 EUR: the parcel never arrived." in first
    assert first.splitlines()[-2:] == [
        "   clerk wants to pay 30.00 EUR back",
        "case-1 waits for you: run this again, with --yes or --no or at a terminal.",
    ]
    assert "***" not in first

    second = run(go_on, **with_servers)
    assert second.count(PAID) == second.count(SENT) == 1
    assert "researcher" not in second
    assert second.endswith("case-1: The case is closed: paid, letter sent.\n")
    assert run(go_on, **with_servers) == "case-1 goes on.\ncase-1: The case is closed: paid, letter sent.\n"

    # Inner graphs are saved in namespaces of their own, where the stock saver finds them too.
    with psycopg.connect(with_servers["POSTGRES_URI"]) as conn:
        rows = conn.execute("SELECT DISTINCT split_part(checkpoint_ns, ':', 1) FROM checkpoints").fetchall()
    assert {row[0] for row in rows} == {"", "researcher", "clerk"}
    with PostgresSaver.from_conn_string(with_servers["POSTGRES_URI"]) as stock:
        found = stock.get_tuple({"configurable": {"thread_id": "case-1"}})
    assert found is not None
    assert found.checkpoint["channel_values"]["paid"] is True


def test_what_a_person_refuses_does_not_happen(with_servers: dict[str, str]) -> None:
    said = run(commands("supervisor")[2], **with_servers)
    assert said.startswith("case-2 begins.\n")
    assert "***" not in said
    assert said.endswith("case-2: The case is closed: not paid, no letter.\n")


def test_at_a_terminal_it_asks_for_each_and_one_can_decide_later(with_servers: dict[str, str]) -> None:
    begin = commands("supervisor")[0]
    with terminal(begin, **with_servers) as first:
        first.wait_for("Approve?")
        first.type("perhaps")
        first.wait_for("Approve?", 2)
        first.type("y")
        first.wait_for("wants to write to Ines")
        first.wait_for("Approve?", 3)
        first.type("q")
        assert first.ended() == 0
        first.wait_for("case-1 waits for you")
        assert PAID in first.said
        assert SENT not in first.said
    with terminal(begin, **with_servers) as second:
        second.wait_for("Approve?")
        second.type("n")
        assert second.ended() == 0
        second.wait_for("case-1: The case is closed: paid, no letter.")
        assert "***" not in second.said


def test_a_case_survives_the_kill_of_its_process_and_of_its_private_servers(shared_folder: Path) -> None:
    begin, go_on, _ = commands("supervisor")
    more = ("--data", str(shared_folder / "data"))
    with terminal(begin, *more) as first:
        first.wait_for("Approve?")
        first.type("y")
        first.wait_for("Approve?", 2)
        first.kill()
        assert PAID in first.said
    said = run(go_on, *more)
    assert said.startswith("case-1 goes on.\n   clerk wants to write to Ines")
    assert PAID not in said
    assert said.count(SENT) == 1
    assert said.endswith("case-1: The case is closed: paid, letter sent.\n")
