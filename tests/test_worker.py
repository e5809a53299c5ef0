"""`checkpointer worker` while both servers are there: as a class and as a command."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from helpers import wait_until
from langgraph.checkpoint.postgres import PostgresSaver
from prometheus_client.parser import text_string_to_metric_families
from worker_process import WorkerProcess, config, get, put_threads, saved_threads

from checkpointer import (
    BufferedPostgresSaver,
    BufferUnavailableError,
    ClosedError,
    ConfigurationError,
    NotSetUpError,
    StoreUnavailableError,
    cli,
)
from checkpointer.store import schema
from checkpointer.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PARTITIONS = 7


@pytest.fixture
def saver(postgres_uri: str, redis_url: str, prefix: str) -> Iterator[BufferedPostgresSaver]:
    """An application's saver that flushes nothing by itself."""
    with BufferedPostgresSaver.from_conn_string(
        postgres_uri, redis_url=redis_url, prefix=prefix, partitions=PARTITIONS, hooks=(), triggers=frozenset()
    ) as opened:
        opened.setup()
        yield opened


@pytest.fixture
def make(postgres_uri: str, redis_url: str, prefix: str) -> Iterator[Callable[..., Worker]]:
    workers = []

    def _make(**settings: Any) -> Worker:
        worker = Worker(postgres_uri, redis_url, **{"prefix": prefix, "flush_age": 0.05, "hooks": (), **settings})
        workers.append(worker)
        return worker

    yield _make
    for worker in workers:
        worker.stop()


@pytest.mark.parametrize("concurrency", [1, 3, PARTITIONS + 5])
def test_it_flushes_the_threads_of_every_partition_whoever_put_them(
    saver: BufferedPostgresSaver, make: Any, postgres_uri: str, concurrency: int
) -> None:
    threads = put_threads(saver, 40)
    with make(concurrency=concurrency):
        wait_until(lambda: saved_threads(postgres_uri) == threads)
        more = put_threads(saver, 40, "later")
        wait_until(lambda: saved_threads(postgres_uri) == threads | more)


def test_what_it_flushed_is_what_stock_reads(saver: BufferedPostgresSaver, make: Any, postgres_uri: str) -> None:
    put_threads(saver, 1)
    with make():
        wait_until(lambda: saved_threads(postgres_uri))
    with PostgresSaver.from_conn_string(postgres_uri) as stock:
        found = stock.get_tuple(config("t0"))
    assert found is not None
    assert found.checkpoint["channel_values"] == {"xs": [1]}


def test_stop_drains_what_is_younger_than_the_flush_age_too(
    saver: BufferedPostgresSaver, make: Any, postgres_uri: str
) -> None:
    worker = make(flush_age=3600)
    worker.start()
    threads = put_threads(saver, 40)
    report = worker.stop()
    assert report
    assert str(report) == "The buffer is drained."
    assert saved_threads(postgres_uri) == threads
    assert worker.totals().checkpoints == 40


def test_it_can_be_started_and_stopped_twice_but_not_started_after_that(
    saver: BufferedPostgresSaver, make: Any
) -> None:
    worker = make()
    worker.start()
    worker.start()
    first = worker.stop()
    assert worker.stop() is first
    with pytest.raises(ClosedError, match="make a new one"):
        worker.start()
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("checkpointer-worker")], names


def test_one_that_was_never_started_can_be_stopped(make: Any) -> None:
    worker = make()
    assert worker.stop()
    assert worker.stop()


def test_run_returns_when_another_thread_stops_it(saver: BufferedPostgresSaver, make: Any) -> None:
    worker = make()
    reports: list[Any] = []
    running = threading.Thread(target=lambda: reports.append(worker.run()))
    running.start()
    wait_until(lambda: worker.why_unhealthy() is None and worker.why_not_ready() is None)
    report = worker.stop()
    running.join(10)
    assert reports == [report]


def test_run_minds_a_signal_whichever_thread_the_kernel_gives_it_to(
    saver: BufferedPostgresSaver, make: Any, postgres_uri: str
) -> None:
    worker = make(flush_age=3600)
    worker.start()
    threads = put_threads(saver, 5)
    before = signal.getsignal(signal.SIGTERM)

    def send() -> None:
        wait_until(lambda: signal.getsignal(signal.SIGTERM) not in (before, signal.SIG_DFL))
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    sending = threading.Thread(target=send)
    sending.start()
    assert worker.run()
    sending.join()
    assert saved_threads(postgres_uri) == threads
    assert signal.getsignal(signal.SIGTERM) == before


def test_another_number_of_partitions_than_the_applications_is_refused(saver: BufferedPostgresSaver, make: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"divided into {PARTITIONS}"):
        make(partitions=32).start()
    make(partitions=PARTITIONS).start()


def test_without_a_saver_before_it_the_partitions_are_the_savers_default(
    make: Any, postgres_uri: str, redis_url: str, prefix: str
) -> None:
    with psycopg.connect(postgres_uri, autocommit=True) as conn:
        schema.setup(conn)
    with make():
        wait_until(lambda: _stored(postgres_uri, prefix) == [32])
    with BufferedPostgresSaver.from_conn_string(postgres_uri, redis_url=redis_url, prefix=prefix, hooks=()) as saver:
        saver.setup()


def _stored(uri: str, prefix: str) -> list[int]:
    with psycopg.connect(uri, autocommit=True) as conn:
        rows = conn.execute("SELECT partitions FROM checkpoint_buffers WHERE prefix = %s", (prefix,))
        return [row[0] for row in rows]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"concurrency": 0}, "concurrency=0"),
        ({"drain_timeout": -1}, "drain_timeout=-1"),
        ({"stall_timeout": 0}, "stall_timeout=0"),
        ({"partitions": 0}, "partitions=0"),
        ({"triggers": {"close"}}, "flush_age"),
        ({"flush_aeg": 1}, "flush_aeg"),
        ({"http": "8081"}, "host:port"),
        ({"http": "me@host:80"}, "host:port"),
        ({"http": "host:80/path"}, "host:port"),
        ({"http": "host:99999"}, "host:port"),
    ],
)
def test_what_cannot_work_is_refused_at_once(make: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        make(**settings)


def test_it_starts_only_if_both_servers_answer_and_the_tables_are_there(
    make: Any, postgres_uri: str, redis_url: str
) -> None:
    with pytest.raises(NotSetUpError, match="checkpointer migrate"):
        make().start()
    with pytest.raises(StoreUnavailableError, match="Postgres cannot be reached"):
        Worker("postgresql://me:secret@127.0.0.1:1/db", redis_url).start()
    with psycopg.connect(postgres_uri, autocommit=True) as conn:
        schema.setup(conn)
    worker = Worker(postgres_uri, "redis://127.0.0.1:1", hooks=())
    with pytest.raises(BufferUnavailableError, match="Redis cannot be reached"):
        worker.start()
    assert worker.stop()


# -- over HTTP ----------------------------------------------------------------------------------------------------


def test_health_readiness_and_metrics_are_answered(saver: BufferedPostgresSaver, make: Any, prefix: str) -> None:
    worker = make(http="127.0.0.1:0", flush_age=3600)
    worker.start()
    put_threads(saver, 20)
    wait_until(lambda: get(worker.url, "/readyz") == (200, "ok\n"))
    assert get(worker.url, "/healthz?verbose=1") == (200, "ok\n")
    assert get(worker.url, "/")[0] == 404
    waiting = wait_until(lambda: (found := _metrics(worker, prefix))["checkpointer_backlog_threads"] == 20 and found)
    assert waiting["checkpointer_backlog_records"] == 40
    assert waiting["checkpointer_backlog_bytes"] > 40
    assert 0 < waiting["checkpointer_backlog_oldest_age_seconds"] < 60
    assert waiting["checkpointer_flushed_checkpoints_total"] == 0
    assert "checkpointer_last_flush_timestamp_seconds" not in waiting
    assert waiting["checkpointer_tier_up redis"] == waiting["checkpointer_tier_up postgres"] == 1

    url = worker.url
    assert worker.stop()
    with pytest.raises(OSError, match="refused"):
        get(url, "/healthz")


def test_metrics_count_what_was_flushed(saver: BufferedPostgresSaver, make: Any, prefix: str) -> None:
    put_threads(saver, 20)
    worker = make(http="[::1]:0" if socket.has_dualstack_ipv6() else "127.0.0.1:0")
    worker.start()
    found = wait_until(
        lambda: (
            (found := _metrics(worker, prefix))["checkpointer_flushed_checkpoints_total"] == 20
            and found.get("checkpointer_backlog_threads") == 0
            and found
        )
    )
    assert found["checkpointer_flushed_blobs_total"] == 20
    assert found["checkpointer_flushed_writes_total"] == 0
    assert found["checkpointer_flush_failures_total"] == 0
    assert found["checkpointer_backlog_records"] == found["checkpointer_backlog_oldest_age_seconds"] == 0
    assert 1 <= found["checkpointer_flush_batch_seconds_count"] <= 20
    assert found["checkpointer_flush_batch_seconds_sum"] > 0
    assert found["checkpointer_last_flush_timestamp_seconds"] > 1.7e9


def _metrics(worker: Worker, prefix: str) -> dict[str, float]:
    status, text = get(worker.url, "/metrics")
    assert status == 200
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            assert sample.labels.pop("prefix") == prefix
            found[" ".join([sample.name, *sample.labels.values()])] = sample.value
    return found


def test_an_address_in_use_is_refused_and_leaves_nothing_running(saver: BufferedPostgresSaver, make: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        worker = make(http=f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(ConfigurationError, match="cannot be used"):
            worker.start()
    assert worker.url is None


def test_without_the_prometheus_library_it_says_what_to_install(
    saver: BufferedPostgresSaver, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client.exposition", None)
    monkeypatch.delitem(sys.modules, "checkpointer.exposition", raising=False)
    with pytest.raises(ConfigurationError, match=r"pip install .*\[cli\]"):
        make(http="127.0.0.1:0").start()
    make().start()


# -- as a command -------------------------------------------------------------------------------------------------


def test_the_command_drains_everything_on_a_signal_and_exits_with_0(
    saver: BufferedPostgresSaver, postgres_uri: str, redis_url: str, prefix: str, tmp_path: Path
) -> None:
    arguments = ("--prefix", prefix, "--flush-age", "3600", "--concurrency", "2")
    with contextlib.closing(WorkerProcess(tmp_path, postgres_uri, redis_url, *arguments)) as worker:
        worker.started()
        threads = put_threads(saver, 150)
        assert not saved_threads(postgres_uri)
        worker.signal(signal.SIGTERM)
        assert worker.ended() == 0, worker.output
        assert worker.output.endswith("The buffer is drained.\n")
        assert "Traceback" not in worker.output
        assert saved_threads(postgres_uri) == threads


@pytest.mark.parametrize(
    ("postgres", "redis", "said"),
    [
        ("", "redis://127.0.0.1", "Say where Postgres is: set POSTGRES_URI or pass --postgres-uri.\n"),
        ("here", "", "Say where Redis is: set REDIS_URL or pass --redis-url.\n"),
        ("postgres:/me:secret@host", "here", "POSTGRES_URI or --postgres-uri is not a valid connection string.\n"),
        ("here", "here", "checkpointer migrate"),
    ],
)
def test_the_command_says_in_one_line_why_it_cannot_start(
    postgres: str,
    redis: str,
    said: str,
    postgres_uri: str,
    redis_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("POSTGRES_URI", postgres_uri if postgres == "here" else postgres)
    monkeypatch.setenv("REDIS_URL", redis_url if redis == "here" else redis)
    monkeypatch.setattr(sys, "argv", ["checkpointer", "worker"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    line = capsys.readouterr().err
    assert (end.value.code, line.count("\n")) == (1, 1)
    assert said in line
