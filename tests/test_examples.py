"""Each example runs by itself, on private servers, and shows what it says that it shows."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from example_processes import Process, commands

if TYPE_CHECKING:
    from conftest import Addresses

EXAMPLES = Path(__file__).parents[1] / "examples"
DEADLINE = 120


def run(name: str, folder: Path, **environment: str) -> str:
    """Run an example from an unrelated folder and return what it printed."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("POSTGRES_URI", "REDIS_URL")}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        cwd=folder,
        env=inherited | environment | {"CHECKPOINTER_SPOOL_DIR": str(folder / "spool")},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, f"{name} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_there_is_a_test_for_every_example() -> None:
    source = Path(__file__).read_text()
    names = [path.name for path in EXAMPLES.glob("[!_]*.py")]
    assert names
    assert [name for name in names if f'run("{name}"' not in source] == []


def test_there_are_instructions_and_tests_for_every_folder_of_examples() -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_example_*.py"))
    folders = [path for path in EXAMPLES.iterdir() if path.is_dir() and not path.name.startswith("_")]
    assert {folder.name for folder in folders} == {"fastapi_chat", "supervisor", "workers"}
    for folder in folders:
        assert f'commands("{folder.name}")' in tests
        assert commands(folder.name)


def test_no_example_hides_a_library_from_those_beside_it() -> None:
    names = [path.stem for path in EXAMPLES.iterdir()] + [path.stem for path in EXAMPLES.glob("*/*.py")]
    assert "quickstart" in names
    # Python looks in a script's folder before it looks among what is installed.
    assert [name for name in names if importlib.util.find_spec(name) is not None] == []


@pytest.mark.parametrize("where", ["private servers", "given servers"])
def test_quickstart_is_read_back_by_the_stock_saver(
    where: str, servers: Addresses, postgres_uri: str, tmp_path: Path
) -> None:
    given = {"POSTGRES_URI": postgres_uri, "REDIS_URL": servers.redis_url}
    said = run("quickstart.py", tmp_path, **(given if where == "given servers" else {}))
    assert "agent: Paris: 11 degrees, rain; Oslo: 4 degrees, snow" in said
    assert "agent: Before that you asked: What is the weather in Paris and Oslo?" in said
    assert "everything is in Postgres: True" in said
    assert "stock PostgresSaver reads 10 checkpoints, the buffered one 10" in said
    assert "the same ones: True" in said
    assert "the same conversation: True (8 messages)" in said


def test_nan_fails_the_stock_saver_and_not_ours(tmp_path: Path) -> None:
    said = run("nan_survives.py", tmp_path)
    assert "the run raises InvalidTextRepresentation" in said
    assert "the run completes; stored: score=None details={'answers': 0, 'mean': None}" in said
    assert re.search(r"reported: .*channel_values\.score, channel_values\.details\.mean", said)
    kept = "score=nan details={'answers': 0, 'mean': inf}"
    assert f"the run completes; stored: {kept}" in said
    assert f"PostgresSaver reads:       {kept}" in said


def test_outage_is_told_to_everyone_and_loses_nothing(tmp_path: Path) -> None:
    said = run("outage.py", tmp_path)
    run_, after = said.split("Asked now, the saver says: ")
    assert "*** Postgres is killed (SIGKILL)" in run_
    assert "the run has completed" in run_
    assert after.startswith("all in Postgres: False")
    notice = "This conversation could not be saved to permanent storage yet. It is buffered."
    assert f"[user's screen] critical: {notice}" in said
    assert "[user's screen] info: This conversation is saved again." in said
    log = said.partition("The thread's log:")[2].partition("What an administrator finds")[0]
    assert f"critical: {notice}" in log
    admin = said.partition("What an administrator finds")[2]
    assert re.search(r"checkpoint_flush_error on outage-\w+: The database cannot be reached", admin)
    assert re.search(r"resolved by system: \w+\.\w+ of .* UTC shows that this is over\.", admin)
    assert "query unresolved_criticals: 0 rows" in admin
    assert "postgres_connection_error: 1, at worst error" in admin
    acknowledged, read = re.findall(r"acknowledged (\d+) checkpoints; stock PostgresSaver reads (\d+)", said)[0]
    assert int(acknowledged) == int(read) == 13
    assert "lost: 0" in said


def test_crash_recovery_loses_nothing_and_resumes(tmp_path: Path) -> None:
    said = run("crash_recovery.py", tmp_path)
    assert "*** the process is killed (SIGKILL)" in said
    assert int(re.findall(r"acknowledged before the crash: (\d+) checkpoints", said)[0]) >= 8
    assert "of these in Postgres: 0" in said
    assert "lost: 0" in said
    assert "the agent's answer: Paris: 11 degrees, rain; Oslo: " in said
    before, after, again = map(int, re.findall(r"(\d+) before, (\d+) after; (\d+) again", said)[0])
    assert before == 3
    assert before + after - again == 6


def test_custom_hook_hears_of_a_nan_whatever_other_hooks_do(tmp_path: Path) -> None:
    said = run("custom_hook.py", tmp_path)
    assert "function: [warning] Values that Postgres cannot hold were replaced: channel_values.score (nan)" in said
    assert "async:    put.sanitized during put" in said
    assert "the run's answer, whatever the hooks do: nan" in said
    assert "broken: 0 delivered, 2 failed" in said
    assert "after unsubscribing there are: on_event_async, broken" in said
    assert "pager:    [warning] checkpoint_sanitized in application 'checkpointer'" in said


def test_a_run_of_the_stock_saver_goes_on_with_ours_and_ends_with_the_stock_saver(tmp_path: Path) -> None:
    said = run("migrate_from_postgres_saver.py", tmp_path)
    stock, ours, again = re.split(r"\n\n", said.strip())
    assert "3 checkpoints; next: tools; the agent: (calls the tool for Paris)" in stock
    assert "5 checkpoints; next: tools; the agent: (calls the tool for Oslo)" in ours
    assert "everything is in Postgres: True" in ours
    assert "7 checkpoints; next: nothing; the agent: Paris: 11 degrees, rain; Oslo: 4 degrees, snow" in again
    assert "the checkpoints of step 1 are still there, unchanged: True" in again


def test_the_applications_own_login_decides_who_may_do_what(tmp_path: Path) -> None:
    said = run("bring_your_own_auth.py", tmp_path)
    answers = re.findall(r"^   (\w+) +([A-Z]+) +(/\S+) +(\d+)", said, re.MULTILINE)
    found = [
        (name, method, path.replace("/admin/system-errors", "~"), status) for name, method, path, status in answers
    ]
    assert found == [
        ("nobody", "GET", "~", "401"),
        *((name, "POST", "/login", "204") for name in ("vera", "oleg", "ada", "carl")),
        ("carl", "GET", "~", "403"),
        ("carl", "GET", "/threads/order-1/logs", "200"),
        ("vera", "GET", "/threads/order-1/logs", "404"),
        ("vera", "GET", "~", "200"),
        ("vera", "POST", "~/1/resolve", "403"),
        ("oleg", "POST", "~/1/resolve", "200"),
        ("oleg", "DELETE", "~/1", "403"),
        ("ada", "DELETE", "~/1", "200"),
        ("ada", "GET", "~/audit", "200"),
    ]
    assert "warning: The payment did not go through; we have asked again." in said
    assert "resolved by oleg: Asked for another card." in said
    audit = re.findall(r"^   (\w+) +(\w+)$", said.partition("The audit:")[2], re.MULTILINE)
    assert audit == [
        ("refuse", "anonymous"),
        ("refuse", "carl"),
        ("refuse", "vera"),
        ("resolve", "oleg"),
        ("refuse", "oleg"),
        ("delete", "ada"),
    ]


def test_the_application_with_its_own_login_stays_if_it_is_told_to(tmp_path: Path) -> None:
    words = [sys.executable, str(EXAMPLES / "bring_your_own_auth.py"), "--serve"]
    with Process(words, tmp_path, tmp_path, CHECKPOINTER_SPOOL_DIR=str(tmp_path / "spool")) as process:
        url = process.wait_for(r"curl -b jar (http://\S+)/admin")
        login = json.loads(process.wait_for(r"--json '(.*)'"))
        with httpx.Client(base_url=url, timeout=60) as client:
            assert client.post("/login", json=login).status_code == 204
            (error,) = client.get("/admin/system-errors").json()["errors"]
        assert error["error_message"] == "The bank refused the card."
        assert process.end(signal.SIGINT) == 0


def test_opentelemetry_prints_spans_below_the_applications_and_metrics(tmp_path: Path) -> None:
    said = run("opentelemetry_tracing.py", tmp_path)
    spans, metrics = said.split("\n\n")
    found = re.findall(r"span (\w{16})(?: below (\w{16}))?: ([\w ]+), [\d.]+ ms(?:; noted: (.*))?", spans)
    (ours,) = [span for span, _, name, _ in found if name == "rate an answer"]
    of_the_run = [(name, noted) for _, parent, name, noted in found if parent == ours]
    assert sorted(of_the_run) == [
        ("checkpointer get_tuple", ""),
        ("checkpointer put", ""),
        ("checkpointer put", ""),
        ("checkpointer put", "put.sanitized"),
        ("checkpointer put_writes", ""),
        ("checkpointer put_writes", "put.sanitized"),
    ]
    assert ("", "checkpointer flush") in [(parent, name) for _, parent, name, _ in found]
    assert "checkpointer.operation_duration{operation=put}: 3 times, " in metrics
    assert "checkpointer.events{name=put.sanitized, severity=warning}: 2\n" in metrics
    assert "checkpointer.flushed_checkpoints{}: 3\n" in metrics
