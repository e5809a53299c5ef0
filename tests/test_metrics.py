"""What a saver counts of itself, whoever asks: the seam that Prometheus and OpenTelemetry read."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers import put_one, wait_until
from poisoning import forbid, put_steps
from savers import NOTHING, config, make_checkpoint, put
from test_events_document import documented
from worker_process import get

from checkpointer import BufferedPostgresSaver, CheckpointEvent, InvalidConfigError
from checkpointer.exposition import render
from checkpointer.instruments import CRITICAL_EVENTS, Distribution, Instruments, Measured, Recorder, joined
from checkpointer.metrics import EVENTS, METRICS, PREFIX
from checkpointer.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable

    import psycopg

DOCUMENT = Path(__file__).parents[1] / "docs" / "metrics.md"


def read(saver: Any) -> dict[str, Any]:
    """Return what the metrics say, by name and label values."""
    return {
        " ".join([metric.name, *labels]): value
        for metric, samples in saver.instruments.read()
        for labels, value in samples.items()
    }


def test_the_document_has_every_metric_with_its_kind_unit_and_labels_and_no_other() -> None:
    rows = re.findall(rf"^\| `{PREFIX}(\w+)` \| (\w+) \| ([^|]*) \| ([^|]*) \|", DOCUMENT.read_text(), re.MULTILINE)
    units = {"s": "seconds", "By": "bytes", "1": "ratio", "": ""}
    assert {(name, kind, unit.strip(), tuple(re.findall(r"`(\w+)`", labels))) for name, kind, unit, labels in rows} == {
        (one.name + ("_total" if one.kind == "counter" else ""), one.kind, units[one.unit], one.labels)
        for one in METRICS
    }


def test_a_label_is_never_something_without_bound() -> None:
    assert {label for metric in METRICS for label in metric.labels} == {
        "name", "severity", "operation", "hook", "reason", "tier",
    }  # fmt: skip


def test_operations_are_timed_only_while_somebody_measures(make: Callable[..., Any]) -> None:
    saver = make()
    put(saver, "t", 0)
    list(saver.list(config()))
    assert not [name for name in read(saver) if name.startswith("operation")]
    first, second = saver.instruments.install(), saver.instruments.install()
    put(saver, "t", 1)
    first()
    first()
    put(saver, "t", 2)
    saver.get_tuple(config())
    with pytest.raises(InvalidConfigError):
        saver.get_tuple({"configurable": {}})
    second()
    assert not saver.instruments.is_on
    put(saver, "t", 3)
    found = read(saver)
    assert sum(found["operation_duration_seconds put"].counts) == 2
    assert 0 < found["operation_duration_seconds put"].total < 60
    assert sum(found["operation_duration_seconds get_tuple"].counts) == 2
    assert (found["operation_failures put"], found["operation_failures get_tuple"]) == (0, 1)


async def test_asynchronous_operations_are_timed_as_well(make: Callable[..., Any]) -> None:
    saver = make()
    saver.instruments.install()
    checkpoint, metadata, new = make_checkpoint(0)
    saved = await saver.aput(config(), checkpoint, metadata, new)
    await saver.aput_writes(saved, [("xs", 1)], "task")
    await saver.aget_tuple(config())
    assert [found async for found in saver.alist(config())]
    assert await saver.aflush()
    durations = [name for name in read(saver) if name.startswith("operation_duration_seconds")]
    assert sorted(name.split()[1] for name in durations) == ["get_tuple", "list", "put", "put_writes"]
    await saver.aclose()


def test_what_is_flushed_and_how_long_it_waited_is_counted(make: Callable[..., Any]) -> None:
    saver = make()
    for thread in ("a", "b"):
        put(saver, thread, 0)
    assert saver.flush()
    found = read(saver)
    assert (found["flushed_checkpoints"], found["flushed_blobs"], found["flush_failures"]) == (2, 2, 0)
    assert sum(found["flush_lag_seconds"].counts) == 2
    assert 1 <= sum(found["flush_batch_seconds"].counts) <= 2
    assert found["last_flush_timestamp_seconds"] > 1.7e9


def test_a_record_that_postgres_refuses_is_counted_once_and_is_open_until_somebody_acts(
    make: Callable[..., Any], conn: psycopg.Connection[Any]
) -> None:
    saver = make()
    forbid(conn)
    put_steps(saver, "t", 3, {1: "checkpoint"})
    assert not saver.flush()
    assert not saver.flush()
    found = wait_until(lambda: (now := read(saver)).get("dead_letters_open") and now)
    assert (found["dead_letters"], found["dead_letters_open"]) == (1, 1)
    assert found["events dead_letter.added critical"] == 1


def test_what_waits_is_looked_at_only_once_somebody_has_read(make: Callable[..., Any]) -> None:
    saver = make()
    put(saver, "t", 0)

    def looks() -> bool:
        return "checkpointer-watch" in {thread.name for thread in threading.enumerate()}

    assert not looks()
    found = wait_until(lambda: (now := read(saver)).get("backlog_threads") and now)
    assert found["backlog_threads"] == 1
    assert found["backlog_records"] == 2
    assert found["backlog_bytes"] > 0
    assert found["backlog_oldest_age_seconds"] >= 0
    assert found["tier_up redis"] == found["tier_up postgres"] == 1
    assert found["dead_letters_open"] == 0
    assert looks()
    saver.close()
    assert not looks()
    read(saver)
    assert not looks()


def test_what_hooks_make_of_events_is_counted(make: Callable[..., Any]) -> None:
    saver = make()

    def fails(event: CheckpointEvent) -> None:
        raise ValueError("no")

    saver.hooks.add(fails)
    saver.hooks.emit(CheckpointEvent(name="made.up", severity="info", message="x"))
    assert saver.hooks.flush(5)
    # That it has failed is an event for the other, which may be on its way.
    found = wait_until(lambda: (now := read(saver))["hook_delivered append"] == 2 and now)
    assert found["events made.up info"] == 1
    assert found["hook_failures fails"] == 1
    assert found["hook_dropped fails full"] == found["hook_dropped fails resting"] == found["hook_queued fails"] == 0


def test_critical_events_are_zero_before_the_first_so_that_it_is_a_rise() -> None:
    emitted = {name for name, event in documented().items() if event["severity"] == "critical"}
    assert set(CRITICAL_EVENTS) == emitted
    readings = {reading.metric: reading.samples for reading in Instruments().read()}
    assert readings[EVENTS] == {(name, "critical"): 0 for name in CRITICAL_EVENTS}


def test_events_under_ever_new_names_do_not_make_ever_more_samples() -> None:
    instruments = Instruments()
    for number in range(1_000):
        instruments.notice(CheckpointEvent(name=f"made.up{number}", severity="info", message=""))
    samples = {reading.metric: reading.samples for reading in instruments.read()}[EVENTS]
    assert len(samples) <= 201
    assert samples["other", "info"] + len(samples) - 1 - len(CRITICAL_EVENTS) == 1_000


class Broken(Recorder):
    """Fails at everything."""

    def begin(self, *_: Any) -> Any:
        raise ValueError("no")

    end = batch = event = begin


def test_a_recorder_that_fails_breaks_nothing_that_it_is_told_of(
    make: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    saver = make()
    saver.instruments.install(Broken())
    put_one(saver, "t", float("nan"))
    assert saver.flush()
    assert saver.named("put.sanitized")
    assert "an instrument failed" in caplog.text


def test_a_source_that_fails_takes_only_its_own_readings_away(caplog: pytest.LogCaptureFixture) -> None:
    instruments = Instruments()

    def fails() -> Any:
        raise ValueError("no")

    remove = instruments.add_source(fails)
    assert instruments.read()
    assert "an instrument failed" in caplog.text
    caplog.clear()
    remove()
    remove()
    instruments.read()
    assert not caplog.text


def test_a_cancelled_operation_is_no_failed_one() -> None:
    instruments = Instruments()
    instruments.install()
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), Measured(instruments, "put"):
            raise error
    samples = {reading.metric.name: reading.samples for reading in instruments.read()}
    assert samples["operation_failures"] == {("put",): 1}


def test_savers_of_one_prefix_are_joined_by_what_each_metric_means() -> None:
    instruments = [Instruments("p"), Instruments("p")]
    for number, one in enumerate(instruments):
        one.install()
        with Measured(one, "put"):
            pass
        one.notice(CheckpointEvent(name="made.up", severity="info", message=""))
        one.add_source(lambda number=number: _sources(number))
    found = {reading.metric.name: reading.samples for reading in joined(one.read() for one in instruments)}
    assert found["events"]["made.up", "info"] == 2
    duration = found["operation_duration_seconds"]["put",]
    assert isinstance(duration, Distribution)
    assert sum(duration.counts) == 2
    assert found["backlog_bytes"] == {(): 11}
    assert found["tier_up"] == {("redis",): 0}


def _sources(number: int) -> Any:
    from checkpointer.instruments import Reading
    from checkpointer.metrics import BACKLOG_BYTES, TIER_UP

    return [Reading(BACKLOG_BYTES, {(): 10 + number}), Reading(TIER_UP, {("redis",): number})]


def test_a_forked_child_counts_from_nothing(make: Callable[..., Any]) -> None:
    saver = make()
    saver.instruments.install()
    put(saver, "t", 0)
    assert saver.flush()
    read_end, write_end = os.pipe()
    if (child := os.fork()) == 0:
        found = read(saver)
        told = [name for name in found if name.startswith("operation_")], found["flushed_checkpoints"]
        os.write(write_end, repr(told).encode())
        os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        told = pipe.read().decode()
    os.waitpid(child, 0)
    assert told == "([], 0)"


def test_names_of_any_text_can_be_shown() -> None:
    instruments = Instruments("p")
    instruments.notice(CheckpointEvent(name='a"b\n\ud800\x00', severity="info", message=""))
    shown = render({"p": instruments.read()}).decode()
    assert 'name="a\\"b\\n?\x00"' in shown


def test_a_worker_and_a_saver_show_their_metrics_under_the_same_names(
    make: Callable[..., Any], postgres_uri: str, redis_url: str, prefix: str
) -> None:
    saver = make()
    put(saver, "t", 0)
    settings: Any = {"prefix": prefix, "flush_age": 0.05, "hooks": (), "http": "127.0.0.1:0"}
    with Worker(postgres_uri, redis_url, **settings) as worker:
        wait_until(lambda: "backlog_threads" in read(worker) and read(worker)["flushed_checkpoints"])
        wait_until(lambda: "backlog_threads" in read(saver))
        put(saver, "t", 1)
        assert saver.flush()
        status, shown = get(worker.url, "/metrics")
        assert status == 200
        assert worker.hooks.stats() == {}
    own = render({prefix: saver.instruments.read()}).decode()
    assert types(shown) == types(own)
    assert {name.split()[0].removesuffix("_total") for name in types(shown)} == {
        PREFIX + metric.name for metric in METRICS if metric.name != "spooled_rows"
    }


def types(text: str) -> set[str]:
    return set(re.findall(r"^# TYPE (.*)$", text, re.MULTILINE))


def test_no_thread_and_no_secret_gets_into_a_metric(
    make: Callable[..., Any], postgres_uri: str, redis_url: str
) -> None:
    saver = make(hooks=("console",))
    saver.instruments.install()
    put_one(saver, "thread-of-someone", float("nan"), run_id="run-of-someone")
    assert saver.flush()
    saver.named("put.sanitized")
    wait_until(lambda: "backlog_threads" in read(saver))
    shown = render({saver.instruments.prefix: saver.instruments.read()}).decode()
    assert "put.sanitized" in shown
    for text in ("of-someone", postgres_uri, redis_url):
        assert text not in shown


def test_a_saver_that_nobody_measures_has_no_thread_for_it(postgres_uri: str, redis_url: str, prefix: str) -> None:
    with BufferedPostgresSaver.from_conn_string(
        postgres_uri, redis_url=redis_url, prefix=prefix, hooks=(), triggers=NOTHING
    ) as saver:
        saver.setup()
        put(saver, "t", 0)
        assert saver.flush()
        assert "checkpointer-watch" not in {thread.name for thread in threading.enumerate()}
