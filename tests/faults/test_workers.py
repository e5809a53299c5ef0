"""What becomes of the work of workers that die, stand still or run out of time, and of a worker whose servers do."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import redis
from helpers import wait_until
from langgraph.checkpoint.base import empty_checkpoint
from proxy import proxied
from psycopg.rows import dict_row
from worker_process import WorkerProcess, config, get, put_threads, saved_threads

from checkpointer import BufferedPostgresSaver
from checkpointer.buffer import scripts
from checkpointer.flush import session
from checkpointer.hooks import STANDARD_HOOKS
from checkpointer.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from checkpointer.embedded import Servers

# The server takes the locks from a worker that stands still after 10 s; the rest is for a slow machine.
TAKEN_OVER = 25

PARTITIONS = 4


@dataclass(frozen=True)
class Place:
    """Where an application and its workers work together."""

    postgres_uri: str
    redis_url: str
    prefix: str

    def worker(self, **settings: Any) -> Worker:
        """Return a worker in this process."""
        settings = {"prefix": self.prefix, "flush_age": 0.05, "hooks": (), **settings}
        return Worker(self.postgres_uri, self.redis_url, **settings)


@contextlib.contextmanager
def saver_at(place: Place) -> Iterator[BufferedPostgresSaver]:
    """An application's saver that flushes nothing by itself."""
    with BufferedPostgresSaver.from_conn_string(
        place.postgres_uri,
        redis_url=place.redis_url,
        prefix=place.prefix,
        partitions=PARTITIONS,
        hooks=(),
        triggers=frozenset(),
        close_timeout=0,
    ) as opened:
        opened.setup()
        yield opened


def load_scripts(redis_url: str) -> None:
    """Have Redis know the scripts, so that the first call of each is the one that counts."""
    with redis.Redis.from_url(redis_url) as client:
        for script in (scripts.DRAIN, scripts.ACK):
            client.script_load(script.source)


@pytest.fixture
def shared(postgres_uri: str, redis_url: str, prefix: str) -> Place:
    """A place on the session's servers, for faults of workers alone."""
    load_scripts(redis_url)
    return Place(postgres_uri, redis_url, prefix)


@pytest.fixture
def saver(shared: Place) -> Iterator[BufferedPostgresSaver]:
    with saver_at(shared) as opened:
        yield opened


@pytest.fixture
def own(own_servers: Servers) -> Place:
    """A place on servers of the test's own."""
    load_scripts(own_servers.redis_url)
    return Place(own_servers.postgres_uri, own_servers.redis_url, "own")


@pytest.fixture
def own_saver(own: Place) -> Iterator[BufferedPostgresSaver]:
    with saver_at(own) as opened:
        yield opened


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Callable[..., WorkerProcess]]:
    processes = []

    def _process(place: Place, *arguments: str, redis_url: str | None = None) -> WorkerProcess:
        arguments = ("--prefix", place.prefix, "--flush-age", "0.05", *arguments)
        worker = WorkerProcess(tmp_path, place.postgres_uri, redis_url or place.redis_url, *arguments)
        processes.append(worker)
        return worker

    yield _process
    for worker in processes:
        worker.close()


def put_revision(saver: BufferedPostgresSaver, checkpoint: Any, revision: int, thread: str = "t") -> None:
    metadata: Any = {"source": "loop", "step": 1, "revision": revision}
    saver.put(config(thread), checkpoint, metadata, {})


def revisions(uri: str) -> dict[str, int]:
    with psycopg.connect(uri, autocommit=True) as conn:
        return dict(conn.execute("SELECT thread_id, (metadata ->> 'revision')::int FROM checkpoints").fetchall())


# -- workers that die or stand still --------------------------------------------------------------------------------


def test_a_killed_workers_partitions_are_taken_over_at_once(
    saver: BufferedPostgresSaver, shared: Place, process: Any
) -> None:
    with proxied(shared.redis_url) as (held_url, proxy):
        hold = proxy.hold(scripts.DRAIN.sha.encode(), reply=True)
        dies = process(shared, "--concurrency", "1", redis_url=held_url).started()
        threads = put_threads(saver, 20)
        assert hold.taken.wait(20), dies.output
        assert locked_partitions(shared.postgres_uri), "the worker is not inside its transaction"
        dies.close()
        with shared.worker():
            # Far less than what a worker that stands still is given.
            wait_until(lambda: saved_threads(shared.postgres_uri) == threads, timeout=8)


def locked_partitions(uri: str) -> int:
    """Return how many partitions a worker holds."""
    with psycopg.connect(uri) as conn:
        (free,) = conn.execute(
            "SELECT count(*) FROM (SELECT FROM checkpoint_buffer_partitions FOR UPDATE SKIP LOCKED) AS free"
        ).fetchone() or (0,)
        return PARTITIONS - int(free)


def test_a_worker_stopped_in_its_transaction_loses_its_locks_and_does_no_harm_when_it_goes_on(
    saver: BufferedPostgresSaver, shared: Place, process: Any
) -> None:
    uri = shared.postgres_uri
    checkpoint = empty_checkpoint()
    with proxied(shared.redis_url) as (held_url, proxy):
        hold = proxy.hold(scripts.DRAIN.sha.encode(), reply=True)
        stops = process(shared, "--concurrency", "1", redis_url=held_url).started()
        put_revision(saver, checkpoint, 1)
        assert hold.taken.wait(20), stops.output
        stops.signal(signal.SIGSTOP)
        # It has read revision 1 and holds the lock; from here on it stands still.
        put_revision(saver, checkpoint, 2)
        assert revisions(uri) == {}
        with shared.worker():
            wait_until(lambda: revisions(uri) == {"t": 2}, timeout=TAKEN_OVER)
            put_revision(saver, checkpoint, 3)
            wait_until(lambda: revisions(uri) == {"t": 3})
        hold.release()
        assert hold.gone.wait(20)
        stops.signal(signal.SIGCONT)
        # It works again, so it is done with what it held.
        put_revision(saver, empty_checkpoint(), 1, "other")
        stops.signal(signal.SIGTERM)
        assert stops.ended() == 0, stops.output
        assert revisions(uri) == {"t": 3, "other": 1}
        # It lost its locks and says so; that is neither an outage nor a failure.
        assert "flush.lock_lost: This process stood still" in stops.output
        assert "cannot be reached" not in stops.output
        assert "flush.failed" not in stops.output


def has_transaction_timeout(uri: str) -> bool:
    """Tell whether this is PostgreSQL 17 or newer."""
    with psycopg.connect(uri) as conn:
        return conn.info.server_version >= 170_000


def test_a_worker_that_the_server_does_not_take_for_idle_loses_its_locks_in_the_end(
    own_saver: BufferedPostgresSaver, own: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_TRANSACTION_SECONDS", 1)
    with proxied(own.redis_url) as (held_url, proxy):
        hold = proxy.hold(scripts.DRAIN.sha.encode(), reply=True)
        slow = replace(own, redis_url=held_url).worker(redis_timeout=15)  # so it is idle only after 75 s
        with slow:
            threads = put_threads(own_saver, 1)
            assert hold.taken.wait(20)
            assert locked_partitions(own.postgres_uri) == 1
            if has_transaction_timeout(own.postgres_uri):
                wait_until(lambda: locked_partitions(own.postgres_uri) == 0, timeout=40)
            else:  # nothing ends it before the server takes it for idle
                time.sleep(2 * session._TRANSACTION_SECONDS)
                assert locked_partitions(own.postgres_uri) == 1
            hold.release()
            wait_until(lambda: saved_threads(own.postgres_uri) == threads)


def test_an_acknowledgement_that_comes_late_forgets_nothing_newer(
    saver: BufferedPostgresSaver, shared: Place, process: Any
) -> None:
    uri = shared.postgres_uri
    checkpoint = empty_checkpoint()
    with proxied(shared.redis_url) as (held_url, proxy):
        hold = proxy.hold(scripts.ACK.sha.encode(), reply=False)
        stops = process(shared, "--concurrency", "1", redis_url=held_url).started()
        put_revision(saver, checkpoint, 1)
        assert hold.taken.wait(20), stops.output
        stops.signal(signal.SIGSTOP)
        assert revisions(uri) == {"t": 1}
        put_revision(saver, checkpoint, 2)
        assert saver.flush()
        put_revision(saver, checkpoint, 3)
        hold.release()
        assert hold.gone.wait(20)
        stops.signal(signal.SIGCONT)
        wait_until(lambda: revisions(uri) == {"t": 3})
        assert saver.flush()
        assert saver.get_tuple(config("t")).metadata["revision"] == 3  # type: ignore[union-attr, typeddict-item]


@pytest.mark.timeout(240)
def test_what_is_put_again_and_again_never_goes_back_in_postgres_whatever_happens_to_the_workers(
    saver: BufferedPostgresSaver, shared: Place, process: Any
) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed: {seed}")
    rng = random.Random(seed)
    uri = shared.postgres_uri
    workers = [process(shared, "--concurrency", "2") for _ in range(3)]
    for worker in workers:
        worker.started()
    checkpoints = {f"t{n}": empty_checkpoint() for n in range(6)}
    last = 0
    over = threading.Event()
    went_back: list[str] = []
    seen: dict[str, set[int]] = {thread: set() for thread in checkpoints}

    def put() -> None:
        nonlocal last
        while not over.is_set():
            last += 1
            for thread, checkpoint in checkpoints.items():
                put_revision(saver, checkpoint, last, thread)

    def watch() -> None:
        before: dict[str, int] = {}
        with psycopg.connect(uri, autocommit=True) as conn:
            while not over.is_set():
                now = dict(conn.execute("SELECT thread_id, (metadata ->> 'revision')::int FROM checkpoints").fetchall())
                for thread, revision in now.items():
                    seen[thread].add(revision)
                    if revision < before.get(thread, 0):
                        went_back.append(f"{thread}: {before[thread]} -> {revision}")
                before = now

    running = [threading.Thread(target=put), threading.Thread(target=watch)]
    for thread in running:
        thread.start()
    try:
        for _ in range(12):
            stopped = rng.choice(workers)
            stopped.signal(signal.SIGSTOP)
            over.wait(rng.uniform(0.05, 0.5))
            stopped.signal(signal.SIGCONT)
            over.wait(rng.uniform(0.0, 0.3))
        workers.pop(rng.randrange(3)).close()
        count = {thread: len(found) for thread, found in seen.items()}
        wait_until(lambda: all(len(seen[thread]) > count[thread] + 2 for thread in seen), timeout=TAKEN_OVER)
    finally:
        over.set()
        for thread in running:
            thread.join()
    assert not went_back, f"seed {seed}: {went_back}"
    wait_until(lambda: revisions(uri) == dict.fromkeys(checkpoints, last), timeout=TAKEN_OVER)
    for worker in workers:
        worker.signal(signal.SIGTERM)
    assert [worker.ended() for worker in workers] == [0, 0]
    assert revisions(uri) == dict.fromkeys(checkpoints, last)
    print({thread: len(found) for thread, found in seen.items()}, "revisions of", last, "seen")


# -- servers that die or stand still --------------------------------------------------------------------------------


def test_when_the_drain_deadline_is_over_it_exits_with_1_and_says_what_is_left(
    own_saver: BufferedPostgresSaver, own_servers: Servers, own: Place, process: Any
) -> None:
    worker = process(own, "--drain-timeout", "1", "--concurrency", "2").started()
    own_servers.postgres.kill()
    threads = put_threads(own_saver, 20)
    worker.signal(signal.SIGTERM)
    assert worker.ended() == 1
    line = worker.output.splitlines()[-1]
    assert line.startswith("40 records of 20 threads"), line
    assert "Postgres cannot be reached" in line
    assert "still in Redis" in line
    own_servers.postgres.start()
    other = own.worker()
    other.start()
    assert other.stop()
    assert saved_threads(own.postgres_uri) == threads


def test_what_is_left_is_said_not_to_be_known_if_redis_is_away(
    own_saver: BufferedPostgresSaver, own_servers: Servers, own: Place
) -> None:
    worker = own.worker(drain_timeout=0.5)
    worker.start()
    own_servers.valkey.kill()
    report = worker.stop()
    assert not report
    assert str(report).startswith("An unknown number of records")
    assert "Redis cannot be reached" in str(report)


def test_a_second_signal_ends_it_at_once(
    own_saver: BufferedPostgresSaver, own_servers: Servers, own: Place, process: Any
) -> None:
    worker = process(own, "--drain-timeout", "3600").started()
    own_servers.postgres.pause()
    put_threads(own_saver, 5)
    worker.signal(signal.SIGINT)
    worker.wait_for("SIGINT: draining")
    worker.signal(signal.SIGTERM)
    assert worker.ended(10) == -signal.SIGTERM
    own_servers.postgres.resume()


@pytest.fixture
def watched(
    own_saver: BufferedPostgresSaver, own: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Worker]:
    """A worker in this process, with the standard hooks, that answers over HTTP."""
    monkeypatch.setenv("CHECKPOINTER_SPOOL_DIR", str(tmp_path))
    with own.worker(
        hooks=STANDARD_HOOKS, http="127.0.0.1:0", stall_timeout=1.5, drain_timeout=5, redis_timeout=0.5
    ) as worker:
        wait_until(lambda: get(worker.url, "/readyz") == (200, "ok\n"))
        yield worker


def metrics_of(worker: Worker) -> dict[str, float]:
    lines = [line for line in get(worker.url, "/metrics")[1].splitlines() if not line.startswith("#")]
    return {name.replace('prefix="own"', ""): float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_while_postgres_is_down_it_is_not_ready_but_healthy_and_an_administrator_is_told(
    own_saver: BufferedPostgresSaver, own_servers: Servers, watched: Worker
) -> None:
    own_servers.postgres.kill()
    threads = put_threads(own_saver, 10)
    status, text = wait_until(lambda: (found := get(watched.url, "/readyz"))[0] != 200 and found)
    assert (status, "Postgres cannot be reached" in text) == (503, True)
    wait_until(lambda: metrics_of(watched)['checkpointer_tier_up{,tier="postgres"}'] == 0)
    wait_until(lambda: metrics_of(watched)["checkpointer_backlog_threads{}"] == 10)
    wait_until(lambda: metrics_of(watched)["checkpointer_flush_failures_total{}"] > 0)
    assert get(watched.url, "/healthz") == (200, "ok\n")
    own_servers.postgres.start()
    wait_until(lambda: get(watched.url, "/readyz") == (200, "ok\n"), timeout=30)
    wait_until(lambda: saved_threads(own_servers.postgres_uri) == threads, timeout=30)

    def reported() -> Any:
        with (
            contextlib.suppress(psycopg.OperationalError),
            psycopg.connect(own_servers.postgres_uri, row_factory=dict_row) as conn,
        ):
            return conn.execute("SELECT error_type, severity FROM system_errors").fetchall()

    rows = wait_until(reported, timeout=30)
    assert {"error_type": "postgres_connection_error", "severity": "error"} in rows


def test_while_redis_is_down_it_is_not_ready_and_no_number_says_what_waits(
    own_saver: BufferedPostgresSaver, own_servers: Servers, watched: Worker
) -> None:
    own_servers.valkey.kill()
    status, text = wait_until(lambda: (found := get(watched.url, "/readyz"))[0] != 200 and found)
    assert (status, "Redis cannot be reached" in text) == (503, True)
    metrics = metrics_of(watched)
    assert metrics['checkpointer_tier_up{,tier="redis"}'] == 0
    assert not [name for name in metrics if "backlog" in name]
    own_servers.valkey.start()
    wait_until(lambda: get(watched.url, "/readyz") == (200, "ok\n"), timeout=30)


def test_a_flush_that_stands_still_makes_it_unhealthy_until_it_goes_on(
    own_saver: BufferedPostgresSaver, own_servers: Servers, watched: Worker
) -> None:
    own_servers.postgres.pause()
    put_threads(own_saver, 10)
    status, text = wait_until(lambda: (found := get(watched.url, "/healthz"))[0] != 200 and found)
    assert (status, "has not finished a batch" in text) == (503, True)
    status, text = wait_until(lambda: (found := get(watched.url, "/readyz"))[0] != 200 and found)
    assert (status, "Postgres" in text) == (503, True)
    own_servers.postgres.resume()
    wait_until(lambda: get(watched.url, "/healthz") == (200, "ok\n"))
    wait_until(lambda: get(watched.url, "/readyz") == (200, "ok\n"), timeout=30)
