"""Redis refuses, is slow, answers in part, dies: nothing acknowledged is lost, nothing is there twice."""

from __future__ import annotations

import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest
import redis
from audit import key_of
from bench import Bench
from fault_graph import build, config_of, turn
from helpers import wait_until, with_database
from redis.backoff import NoBackoff
from redis.retry import Retry

from checkpointer import BufferUnavailableError, StoreUnavailableError, TierUnavailableError, embedded
from checkpointer.buffer import scripts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bench import BenchSaver


PUT, PUT_WRITES = scripts.PUT.sha.encode(), scripts.WRITES.sha.encode()
DRAIN, ACK = scripts.DRAIN.sha.encode(), scripts.ACK.sha.encode()


@pytest.fixture(scope="module")
def module_servers() -> Iterator[embedded.Servers]:
    arguments = ["--appendfsync", "always", "--enable-debug-command", "yes"]
    # Postgres is left alone here, and its last checkpoint would take long on a busy disk.
    with embedded.servers(postgres_settings={"fsync": "off"}, valkey_args=arguments) as pair:
        yield pair


@pytest.fixture
def bench(module_servers: embedded.Servers, tmp_path: Path) -> Iterator[Bench]:
    """A bench on servers of this module, which are to be left in order."""
    name = f"t{uuid4().hex[:12]}"
    with psycopg.connect(module_servers.postgres_uri, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'")
    made = Bench(with_database(module_servers.postgres_uri, name), module_servers.redis_url, name, tmp_path)
    yield made
    made.close()
    with redis.Redis.from_url(module_servers.redis_url) as client:
        client.flushall()


@pytest.fixture
def admin(module_servers: embedded.Servers) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(module_servers.redis_url, socket_timeout=10) as client:
        client.ping()
        yield client


def told_of_outage(saver: BenchSaver) -> None:
    """Check that operators and the thread's user were told."""
    assert saver.hooks.flush(5)
    assert saver.named("backend.down", error_type="redis_connection_error")
    around = saver.named("put.around", thread_id="t", error_type="checkpoint_buffer_error")
    assert around
    assert all(event.user_notice for event in around)


def run_during(saver: BenchSaver, fault: Any) -> None:
    """Have a fault begin in the middle of a run and end after it; it yields what is to be said of it."""
    with ExitStack() as stack:
        expected: list[str] = []
        result = turn(saver, "t", lambda: expected.append(stack.enter_context(fault)))
        assert len(result["xs"]) == 5
        # The first flush may only find that its connection has ended.
        reports = [saver.flush(), saver.flush()]
        told_of_outage(saver)
        errors = [event.error for event in saver.events if event.error]
        said = [
            text for error in (*errors, *(r.error for r in reports)) if error for text in (error.message, *error.causes)
        ]
        assert any(expected[0] in text for text in said), said


# -- refused ------------------------------------------------------------------------------------------------------


@contextmanager
def full(admin: redis.Redis, servers: embedded.Servers) -> Iterator[str]:
    admin.config_set("maxmemory", "1")
    try:
        yield "maxmemory"
    finally:
        admin.config_set("maxmemory", "0")


@contextmanager
def read_only_replica(admin: redis.Redis, servers: embedded.Servers) -> Iterator[str]:
    admin.replicaof("127.0.0.1", "1")
    try:
        yield "read only replica"
    finally:
        admin.replicaof("NO", "ONE")


@contextmanager
def password_set(admin: redis.Redis, servers: embedded.Servers) -> Iterator[str]:
    admin.config_set("requirepass", "new")
    admin.client_kill_filter(_type="normal", skipme=True)
    try:
        yield "Authentication required"
    finally:
        admin.config_set("requirepass", "")


@contextmanager
def rights_taken(admin: redis.Redis, servers: embedded.Servers) -> Iterator[str]:
    admin.execute_command("ACL", "SETUSER", "default", "-evalsha", "-eval")
    try:
        yield "no permissions"
    finally:
        admin.execute_command("ACL", "SETUSER", "default", "+@all")


@contextmanager
def snapshot_failed(admin: redis.Redis, servers: embedded.Servers) -> Iterator[str]:
    # A file cannot be renamed onto a folder.
    blocker = servers.data_dir / "valkey" / "dump.rdb"
    blocker.mkdir()
    admin.config_set("save", "3600 1")
    admin.bgsave()
    wait_until(lambda: admin.info("persistence")["rdb_last_bgsave_status"] == "err")
    try:
        yield "MISCONF"
    finally:
        admin.config_set("save", "")
        blocker.rmdir()
        admin.bgsave()
        wait_until(lambda: admin.info("persistence")["rdb_last_bgsave_status"] == "ok")


@pytest.mark.parametrize("refused", [full, read_only_replica, password_set, rights_taken, snapshot_failed])
def test_a_run_goes_around_a_redis_that_refuses_and_comes_back_to_it(
    bench: Bench, admin: redis.Redis, module_servers: embedded.Servers, refused: Any
) -> None:
    saver = bench.saver()
    turn(saver, "warm")
    run_during(saver, refused(admin, module_servers))
    wait_until(lambda: _put_is_buffered(saver), message="puts go to Redis again")
    bench.recovered(saver)
    saver.hooks.flush(5)
    assert saver.named("backend.up")
    turn(saver, "t")
    bench.audit()


def _put_is_buffered(saver: BenchSaver) -> bool:
    """Make a run on a new thread, and tell whether none of it had to go around."""
    thread = f"probe-{uuid4().hex}"
    try:
        turn(saver, thread)
    except TierUnavailableError:
        return False
    saver.hooks.flush(5)
    return not saver.named("put.around", thread_id=thread)


def test_while_redis_loads_its_file_runs_go_around_it_and_afterwards_all_is_there(tmp_path: Path) -> None:
    # The delay for each key holds for a file whose base is a snapshot, as it is after a rewrite.
    slowly = ["--loading-process-events-interval-bytes", "1024", "--key-load-delay", "500"]
    with embedded.servers(valkey_args=[*slowly, "--appendfsync", "always"]) as servers, ExitStack() as stack:
        bench = Bench(servers.postgres_uri, servers.redis_url, "checkpointer", tmp_path)
        stack.callback(bench.close)
        admin = stack.enter_context(redis.Redis.from_url(servers.redis_url, retry=Retry(NoBackoff(), 0)))
        saver = bench.saver()
        turn(saver, "before")
        admin.mset({f"filler-{i}": "x" * 100 for i in range(2_000)})
        admin.bgrewriteaof()
        wait_until(lambda: not admin.info("persistence")["aof_rewrite_in_progress"])
        loading = threading.Thread(target=servers.valkey.start)

        @contextmanager
        def loads() -> Iterator[str]:
            servers.valkey.kill()
            loading.start()
            wait_until(lambda: "loading" in _error_of(admin))
            yield "loading"
            loading.join()

        run_during(saver, loads())
        wait_until(lambda: _put_is_buffered(saver), message="puts go to Redis again")
        turn(saver, "before")
        bench.audit()


def _error_of(client: redis.Redis) -> str:
    try:
        client.ping()
    except redis.RedisError as exc:
        return str(exc)
    return ""


# -- slow or silent -----------------------------------------------------------------------------------------------


@contextmanager
def far_away(bench: Bench, admin: redis.Redis) -> Iterator[str]:
    bench.redis.request_delay = bench.redis.reply_delay = 0.2
    try:
        yield ""
    finally:
        bench.redis.request_delay = bench.redis.reply_delay = 0.0


@contextmanager
def half_open(bench: Bench, admin: redis.Redis) -> Iterator[str]:
    bench.redis.silence(new_ones=True)
    try:
        yield ""
    finally:
        bench.redis.allow()


@contextmanager
def asleep(bench: Bench, admin: redis.Redis) -> Iterator[str]:
    sleeping = threading.Thread(target=lambda: admin.execute_command("DEBUG", "SLEEP", "2"))
    sleeping.start()
    # It sleeps once it does not answer.
    with redis.Redis.from_url(bench.redis_url, socket_timeout=0.1, retry=Retry(NoBackoff(), 0)) as other:
        wait_until(lambda: "Timeout" in _error_of(other))
    try:
        yield ""
    finally:
        sleeping.join()


@pytest.mark.parametrize("slow", [far_away, half_open, asleep])
def test_a_redis_slower_than_its_deadline_counts_as_away_and_what_it_did_late_is_no_duplicate(
    bench: Bench, admin: redis.Redis, slow: Any
) -> None:
    saver = bench.saver(redis_timeout=0.25)
    turn(saver, "warm")
    run_during(saver, slow(bench, admin))
    wait_until(lambda: _put_is_buffered(saver), message="puts go to Redis again")
    turn(saver, "t")
    bench.audit()


# -- answered in part ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 7])
@pytest.mark.parametrize("request_", [PUT, PUT_WRITES], ids=["put", "put_writes"])
def test_a_reply_that_is_lost_or_cut_off_after_redis_has_done_the_work_makes_no_duplicate(
    bench: Bench, request_: bytes, after: int
) -> None:
    saver = bench.saver()
    turn(saver, "warm")
    bench.redis.cut_reply(request_, after=after)
    turn(saver, "t")
    told_of_outage(saver)
    bench.audit()


def test_a_put_that_the_caller_repeats_is_there_once(bench: Bench) -> None:
    saver = bench.saver(triggers=frozenset())
    turn(saver, "t")
    found = saver.get_tuple(config_of("t"))
    assert found
    assert found.parent_config
    calls = (found.parent_config, found.checkpoint, found.metadata, found.checkpoint["channel_versions"])
    bench.redis.cut_reply(PUT)
    for _ in range(3):
        saver.put(*calls)
        saver.put_writes(found.config, [("xs", ["w"])], "task-of-the-test")
    assert saver.flush()
    for _ in range(2):
        saver.put(*calls)
        saver.put_writes(found.config, [("xs", ["w"])], "task-of-the-test")
    again = saver.get_tuple(config_of("t"))
    assert again
    assert again.checkpoint == found.checkpoint
    assert again.parent_config == found.parent_config
    assert [w for w in again.pending_writes or () if w[0] == "task-of-the-test"] == [("task-of-the-test", "xs", ["w"])]
    bench.audit()


@pytest.mark.parametrize("at", [DRAIN, ACK], ids=["drain", "ack"])
@pytest.mark.parametrize("after", [0, 5])
def test_a_flush_whose_reply_is_cut_off_is_made_again_and_writes_nothing_twice(
    bench: Bench, at: bytes, after: int
) -> None:
    saver = bench.saver(triggers=frozenset())
    turn(saver, "warm")
    assert saver.flush()
    turn(saver, "t")
    bench.redis.cut_reply(at, after=after)
    report = saver.flush()
    assert not report
    assert report.error is not None
    saver.hooks.flush(5)
    (failed,) = saver.named("flush.failed", thread_id="t")
    assert (failed.severity, failed.outcome) == ("critical", "retrying")
    assert wait_until(saver.flush)
    saver.hooks.flush(5)
    assert saver.named("flush.recovered", thread_id="t")
    bench.audit()


# -- killed and paused --------------------------------------------------------------------------------------------


def test_redis_killed_again_and_again_under_load_loses_nothing_that_it_acknowledged(
    bench: Bench, module_servers: embedded.Servers
) -> None:
    saver = bench.saver()

    def kills() -> None:
        for _ in range(3):
            bench.wait_for_puts()
            module_servers.valkey.kill()
            module_servers.valkey.start()

    bench.under_load(saver, kills)
    saver.hooks.flush(5)
    downs = saver.named("backend.down", error_type="redis_connection_error")
    assert downs
    assert len(saver.named("backend.up")) >= len(downs) - 1
    assert not saver.named("checkpoint.lost")
    bench.audit()


def test_redis_stopped_in_the_middle_of_a_flush_delays_it_and_nothing_else(
    bench: Bench, module_servers: embedded.Servers
) -> None:
    saver = bench.saver(redis_timeout=0.3, triggers=frozenset())
    turn(saver, "warm")
    assert saver.flush()
    turn(saver, "t")
    latest = saver.get_tuple(config_of("t"))
    assert latest
    bench.redis.trap(DRAIN, module_servers.valkey.pause)
    try:
        report = saver.flush("t")
        assert not report
        assert report.waiting_threads == ["t"]
        saver.put_writes(latest.config, [("xs", ["meanwhile"])], "task-of-the-test")
    finally:
        module_servers.valkey.resume()
    saver.hooks.flush(5)
    assert saver.named("flush.failed", thread_id="t")
    assert wait_until(saver.flush)
    bench.audit()


def test_with_postgres_away_redis_does_not_answer_less_than_what_went_around_it(bench: Bench) -> None:
    saver = bench.saver(redis_timeout=0.3, triggers=frozenset())
    turn(saver, "t")
    assert saver.flush()
    latest = saver.get_tuple(config_of("t"))
    assert latest

    def cut() -> None:
        bench.redis.refuse()

    graph = build(saver, cut)
    graph.invoke({"xs": ["new"], "note": "n"}, config_of("t"))  # begins with Redis, ends around it
    bench.redis.allow()
    newest = max(line[3] for line in bench.log.lines() if line[0] == "put" and line[1:3] == ["t", ""])
    bench.postgres.refuse()
    found = wait_until(lambda: _read(saver))
    assert found == "refused" or key_of(found.config).checkpoint_id >= newest, "a read went back in time"


def _read(saver: Any) -> Any:
    try:
        return saver.get_tuple(config_of("t"))
    except BufferUnavailableError:
        return None
    except StoreUnavailableError:
        return "refused"
