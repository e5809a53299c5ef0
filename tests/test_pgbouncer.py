"""Behind pgbouncer in transaction mode, where no two statements need meet the same server session."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from helpers import wait_until
from langgraph.checkpoint.postgres import PostgresSaver
from load import Load, steps
from psycopg_pool import ConnectionPool

from checkpointer import BufferedPostgresSaver
from checkpointer.embedded import _free_port

if TYPE_CHECKING:
    from collections.abc import Iterator


def config(thread: str) -> Any:
    return {"configurable": {"thread_id": thread, "checkpoint_ns": ""}}


@pytest.fixture
def pooled(postgres_uri: str) -> Iterator[str]:
    """The test's database through a pgbouncer that gives each transaction the session that has rested longest."""
    program = shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"
    assert Path(program).exists(), "pgbouncer is missing: apt-get install pgbouncer"
    address = urlsplit(postgres_uri)
    port = _free_port()
    folder = Path(tempfile.mkdtemp(prefix="checkpointer-pgbouncer-"))
    (folder / "users").write_text(f'"{address.username}" "{address.password or ""}"\n')
    (folder / "pgbouncer.ini").write_text(
        f"""
        [databases]
        * = host={address.hostname} port={address.port}
        [pgbouncer]
        listen_addr = 127.0.0.1
        listen_port = {port}
        unix_socket_dir =
        auth_type = trust
        auth_file = {folder}/users
        pool_mode = transaction
        server_round_robin = 1
        default_pool_size = 5
        """.replace("\n        ", "\n")
    )
    # It refuses to run as root.
    user = None
    if os.geteuid() == 0:
        user = pwd.getpwnam("nobody")
        for path in (folder, *folder.iterdir()):
            os.chown(path, user.pw_uid, user.pw_gid)
    ids: dict[str, Any] = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, str(folder / "pgbouncer.ini")], stdout=log, stderr=log, cwd="/", **ids)
    uri = urlunsplit(address._replace(netloc=address.netloc.rpartition(":")[0] + f":{port}"))

    def answers() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        try:
            psycopg.connect(uri).close()
        except psycopg.OperationalError:
            return False
        return True

    try:
        wait_until(answers, message=(folder / "log").read_text())
        # Transactions at the same time make it open as many sessions, which it goes round from now on.
        with ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(psycopg.connect(uri)).execute("SELECT 1")
        yield uri
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)


@pytest.fixture
def make(pooled: str, redis_url: str, prefix: str) -> Iterator[Any]:
    savers = []

    def _make(**options: Any) -> Any:
        options = {"prefix": prefix, "hooks": (), "pool_size": 3, **options}
        saver: Any = BufferedPostgresSaver.from_conn_string(pooled, redis_url=redis_url, **options)
        saver.events = []
        saver.hooks.add(saver.events.append)
        savers.append(saver)
        return saver

    yield _make
    for saver in savers:
        saver.close()


def test_sessions_change_between_statements_here(pooled: str) -> None:
    with psycopg.connect(pooled, autocommit=True, prepare_threshold=None) as conn:
        asked = [conn.execute("SELECT pg_backend_pid()").fetchone() for _ in range(20)]
    assert len(set(asked)) > 1


async def test_everything_works_with_no_setting_at_all(make: Any, postgres_uri: str) -> None:
    saver = make(flush_age=0.1)
    saver.setup()
    with Load(saver, ["a", "b", "c", "d"]) as load:
        wait_until(lambda: load.count() > 200)
    assert not load.failures
    assert saver.flush()
    assert await saver.aflush()
    assert load.missing(postgres_uri) == []
    for _ in range(10):
        assert saver.get_tuple(config("a")) is not None
        assert await saver.aget_tuple(config("b")) is not None
    ours = [t.config["configurable"]["checkpoint_id"] for t in saver.list(config("a"))]
    assert ours == [t.config["configurable"]["checkpoint_id"] async for t in saver.alist(config("a"))]
    saver.copy_thread("a", "copied")
    await saver.aprune(["a"])
    saver.delete_for_runs(["no-such-run"])
    await saver.adelete_thread("b")
    with PostgresSaver.from_conn_string(postgres_uri) as stock:
        assert len(list(stock.list(config("copied")))) == len(ours)
        assert len(list(stock.list(config("a")))) == 1
        assert list(stock.list(config("b"))) == []
    assert not saver.events
    await saver.aclose()


def test_a_large_batch_is_copied_through_the_pooler(make: Any, postgres_uri: str) -> None:
    saver = make(triggers=frozenset())
    saver.setup()
    puts = steps("t")
    for _ in range(150):
        saver.put(*next(puts))
    assert saver.flush()
    with PostgresSaver.from_conn_string(postgres_uri) as stock:
        assert len(list(stock.list(config("t")))) == 150
    assert not saver.events


def test_puts_go_around_through_the_pooler(pooled: str, postgres_uri: str) -> None:
    saver: Any = BufferedPostgresSaver.from_conn_string(
        pooled, redis_url="redis://127.0.0.1:1", hooks=(), triggers=frozenset()
    )
    with saver:
        with pytest.raises(ConnectionError, match="Redis cannot be reached"):
            saver.setup()
        puts = steps("t")
        for _ in range(10):
            saver.put(*next(puts))
    with PostgresSaver.from_conn_string(postgres_uri) as stock:
        assert len(list(stock.list(config("t")))) == 10


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_setup_from_many_processes_at_once_works_through_the_pooler(
    make: Any, postgres_uri: str, asynchronous: bool
) -> None:
    failures = []

    def set_up(saver: Any) -> None:
        try:
            saver.setup()
        except Exception as exc:  # noqa: BLE001 - the test looks at it
            failures.append(exc)

    if asynchronous:
        saver = make()
        await saver.asetup()
        await saver.aclose()
    workers = [threading.Thread(target=set_up, args=[make()]) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    with psycopg.connect(postgres_uri) as conn:
        assert conn.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'").fetchone() == (0,)


async def test_the_users_own_pool_through_the_pooler_works_with_its_own_setting(
    pooled: str, redis_url: str, prefix: str
) -> None:
    settings = {"autocommit": True, "prepare_threshold": None}
    with ConnectionPool(pooled, kwargs=settings, min_size=1, max_size=3) as pool:
        saver: Any = BufferedPostgresSaver(pool, redis_url, prefix=prefix, hooks=())
        saver.setup()
        puts = steps("t")
        for _ in range(10):
            saver.put(*next(puts))
            assert saver.get_tuple(config("t")) is not None
        assert saver.flush()
        await saver.aclose()
