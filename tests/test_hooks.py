"""What the hook registry promises to emitters and to hooks."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from helpers import wait_until

from checkpointer import hooks as hooks_module
from checkpointer.errors import ClosedError, ConfigurationError
from checkpointer.events import CheckpointEvent, Severity
from checkpointer.hooks import STANDARD_HOOKS, HookContext, Hooks, HookStats, load_hook

if TYPE_CHECKING:
    from collections.abc import Iterator


def event(severity: Severity = "info", name: str = "flush.failed") -> CheckpointEvent:
    return CheckpointEvent(name=name, severity=severity, message="something happened")


@pytest.fixture
def hooks() -> Iterator[Hooks]:
    made = Hooks()
    yield made
    made.close(1)


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Holds a hook until the test ends, so that its thread ends with the test."""
    gate = threading.Event()
    yield gate
    gate.set()


def test_a_hook_gets_every_event_in_order(hooks: Hooks) -> None:
    seen: list[CheckpointEvent] = []
    hooks.add(seen.append, name="seen")
    sent = [event() for _ in range(100)]
    for one in sent:
        hooks.emit(one)
    assert hooks.flush(5)
    assert seen == sent
    assert hooks.stats() == {"seen": HookStats(delivered=100)}


def test_an_async_hook_runs_in_one_loop_of_its_own(hooks: Hooks) -> None:
    loops: list[tuple[Any, int]] = []

    async def hook(_: CheckpointEvent) -> None:
        await asyncio.sleep(0)
        loops.append((asyncio.get_running_loop(), threading.get_ident()))

    hooks.add(hook)
    hooks.emit(event())
    hooks.emit(event())
    assert hooks.flush(5)
    assert len(loops) == 2
    assert len(set(loops)) == 1
    assert loops[0][1] != threading.get_ident()


async def test_emitting_from_a_running_loop_works_with_an_async_hook(hooks: Hooks) -> None:
    seen: list[CheckpointEvent] = []

    async def hook(one: CheckpointEvent) -> None:
        seen.append(one)

    hooks.add(hook)
    hooks.emit(event())
    assert await asyncio.to_thread(hooks.flush, 5)
    assert len(seen) == 1


def test_a_hook_that_hangs_holds_up_neither_the_emitter_nor_another_hook(
    hooks: Hooks, released: threading.Event
) -> None:
    seen: list[CheckpointEvent] = []
    hooks.add(lambda _: released.wait(), name="hangs")
    hooks.add(seen.append, name="seen")
    slowest = 0.0
    for _ in range(50):
        begun = time.perf_counter()
        hooks.emit(event())
        slowest = max(slowest, time.perf_counter() - begun)
    assert slowest < 0.5
    assert not hooks.flush(0.2)
    assert len(seen) == 50
    assert hooks.stats()["hangs"] == HookStats(queued=50)


@pytest.mark.parametrize("raised", [ValueError("no"), SystemExit(1), asyncio.CancelledError()])
def test_a_hook_that_raises_is_counted_and_logged_and_goes_on(
    hooks: Hooks, caplog: pytest.LogCaptureFixture, raised: BaseException
) -> None:
    seen: list[CheckpointEvent] = []

    def hook(_: CheckpointEvent) -> None:
        raise raised

    hooks.add(hook, name="raises")
    hooks.add(seen.append, name="seen")
    with caplog.at_level(logging.WARNING, "checkpointer.hooks"):
        for _ in range(30):
            hooks.emit(event("critical"))
        assert hooks.flush(5)
    assert len([one for one in seen if one.name == "flush.failed"]) == 30
    wait_until(lambda: hooks.stats()["raises"] == HookStats(failed=30))
    assert [r.getMessage() for r in caplog.records] == ["hook raises failed (1 times since the last report)"]


def test_a_logging_handler_that_raises_does_not_end_a_hook(hooks: Hooks) -> None:
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise RuntimeError("broken handler")

    def hook(_: CheckpointEvent) -> None:
        raise ValueError

    handler = Broken()
    logging.getLogger("checkpointer.hooks").addHandler(handler)
    try:
        hooks.add(hook, name="raises")
        hooks.emit(event())
        hooks.emit(event())
        assert hooks.flush(5)
        assert hooks.stats()["raises"].failed == 2
    finally:
        logging.getLogger("checkpointer.hooks").removeHandler(handler)


def test_criticals_survive_a_flood_of_infos(released: threading.Event) -> None:
    hooks = Hooks(capacity=50, reserved=10)
    seen: list[CheckpointEvent] = []

    def slow(one: CheckpointEvent) -> None:
        released.wait()
        seen.append(one)

    hooks.add(slow, name="slow")
    for _ in range(100):
        hooks.emit(event())
        hooks.flush(0)
    criticals = [event("critical") for _ in range(10)]
    for one in criticals:
        hooks.emit(one)
    released.set()
    assert hooks.flush(5)
    assert [one for one in seen if one.severity == "critical"] == criticals
    stats = hooks.stats()["slow"]
    assert stats.delivered + stats.dropped_full == 110
    assert stats.dropped_full > 0
    hooks.close(1)


def test_criticals_survive_a_burst_that_no_thread_had_time_for() -> None:
    hooks = Hooks()
    seen: list[CheckpointEvent] = []
    hooks.add(seen.append, name="seen")
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5)
    try:
        for _ in range(20_000):
            hooks.emit(event())
        critical = event("critical")
        hooks.emit(critical)
    finally:
        sys.setswitchinterval(interval)
    assert hooks.flush(10)
    assert critical in seen
    stats = hooks.stats()["seen"]
    assert stats.delivered + stats.dropped_full == 20_001
    hooks.close(1)


def test_a_flooding_hook_does_not_deadlock_and_is_not_fed_its_own_events(hooks: Hooks) -> None:
    own: list[str] = []
    others: list[str] = []

    def flooding(one: CheckpointEvent) -> None:
        own.append(one.name)
        for _ in range(10):
            hooks.emit(event(name="about.itself"))
        assert hooks.flush(5)

    hooks.add(flooding)
    hooks.add(lambda one: others.append(one.name))
    hooks.emit(event(name="first"))
    assert hooks.flush(10)
    assert own == ["first"]
    assert others == ["first"] + ["about.itself"] * 10


def test_an_event_of_a_thread_that_has_ended_reaches_every_hook() -> None:
    # A hook's thread is started by its first event, and the system gives it the identifier of one that has ended.
    for _ in range(100):
        hooks = Hooks()
        seen: list[list[str]] = [[], [], []]
        for names in seen:
            hooks.add(lambda one, names=names: names.append(one.name))
        emitting = threading.Thread(target=lambda hooks=hooks: [hooks.emit(event(name=name)) for name in "abc"])
        emitting.start()
        emitting.join()
        assert hooks.flush(10)
        hooks.close(5)
        assert seen == [["a", "b", "c"]] * 3


def test_an_emitter_hands_over_once_however_many_hooks_there_are(hooks: Hooks, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(4):
        hooks.add(lambda _: None)
    offered: list[tuple[str, int]] = []
    offer = hooks_module._Lane.offer

    def noting(self: Any, item: Any, *, critical: bool) -> None:
        offered.append((self.name, threading.get_ident()))
        offer(self, item, critical=critical)

    monkeypatch.setattr(hooks_module._Lane, "offer", noting)
    hooks.emit(event())
    assert hooks.flush(5)
    assert [name for name, ident in offered if ident == threading.get_ident()] == ["inbox"]
    assert len(offered) == 5


# -- what a hook says of itself to the others -----------------------------------------------------------------------


def told(seen: list[CheckpointEvent], name: str) -> list[CheckpointEvent]:
    return [one for one in seen if one.name == name]


def test_others_are_told_of_a_hook_that_fails_and_it_is_not(hooks: Hooks) -> None:
    own: list[str] = []
    seen: list[CheckpointEvent] = []

    def fails(one: CheckpointEvent) -> None:
        own.append(one.name)
        raise ValueError("no")

    hooks.add(fails, name="fails")
    hooks.add(seen.append)
    hooks.emit(event())
    wait_until(lambda: told(seen, "hook.failing"))
    found = told(seen, "hook.failing")[0]
    assert (found.severity, found.component, found.error_type) == ("warning", "hooks", "hook_error")
    assert found.error is not None
    assert found.error.type == "ValueError"
    assert found.context == {"hook": "fails", "failed": 1, "skipped": 0}
    assert hooks.flush(5)
    assert own == ["flush.failed"]


def test_two_hooks_that_always_fail_do_not_feed_each_other_for_ever(hooks: Hooks) -> None:
    def fails(_: CheckpointEvent) -> None:
        raise ValueError("no")

    hooks.add(fails, name="a")
    hooks.add(fails, name="b")
    hooks.emit(event())
    wait_until(lambda: all(stats.failed >= 2 for stats in hooks.stats().values()))
    assert hooks.flush(5)
    assert {name: stats.failed for name, stats in hooks.stats().items()} == {"a": 2, "b": 2}


def test_what_a_slow_hook_misses_is_counted_and_told() -> None:
    hooks = Hooks(capacity=20, reserved=5)
    gate = threading.Event()
    seen: list[CheckpointEvent] = []
    hooks.add(lambda _: gate.wait(), name="slow")
    hooks.add(seen.append)
    for _ in range(40):
        hooks.emit(event())
        wait_until(lambda: hooks._inbox.stats().queued == 0)
    dropped = hooks.stats()["slow"].dropped_full
    assert dropped == 40 - 15
    gate.set()
    wait_until(lambda: told(seen, "hook.dropped"))
    assert told(seen, "hook.dropped")[0].context == {"hook": "slow", "dropped": dropped}
    hooks.close(5)


def test_drops_that_were_not_reported_yet_are_at_the_end(
    released: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    hooks = Hooks(capacity=20, reserved=5)

    def slow(_: CheckpointEvent) -> None:
        released.wait()
        raise ValueError("reported first, so that the drops have to wait")

    hooks.add(slow)
    for _ in range(40):
        hooks.emit(event())
        wait_until(lambda: hooks._inbox.stats().queued == 0)
    released.set()
    hooks.close(5)
    assert "slow is too slow: 25 events" in caplog.text


def test_a_hook_that_keeps_failing_rests_but_for_criticals_until_it_works_again(
    hooks: Hooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks_module, "_FIRST_REST", 3600.0)
    works = threading.Event()
    own: list[str] = []
    seen: list[CheckpointEvent] = []

    def hook(one: CheckpointEvent) -> None:
        own.append(one.severity)
        if not works.is_set():
            raise ValueError("no")

    hooks.add(hook)
    hooks.add(seen.append)
    for _ in range(10):
        hooks.emit(event())
    assert hooks.flush(5)
    assert own == ["info"] * 5
    hooks.emit(event("critical"))
    assert hooks.flush(5)
    assert own == ["info"] * 5 + ["critical"]
    wait_until(lambda: hooks.stats()["hook"] == HookStats(failed=6, skipped=5))
    works.set()
    hooks.emit(event("critical"))
    hooks.emit(event())
    assert hooks.flush(5)
    wait_until(lambda: told(seen, "hook.recovered"))
    assert own[6:] == ["critical", "info"]
    wait_until(lambda: hooks.stats()["hook"] == HookStats(delivered=2, failed=6, skipped=5))


def test_a_resting_hook_is_tried_again_after_its_rest(hooks: Hooks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks_module, "_FIRST_REST", 0.05)

    def hook(_: CheckpointEvent) -> None:
        raise ValueError("no")

    hooks.add(hook)

    def failed() -> int:
        hooks.emit(event())
        return hooks.stats()["hook"].failed

    wait_until(lambda: failed() >= 7)
    assert hooks.flush(5)
    assert hooks.stats()["hook"].skipped > 0


def test_an_async_hook_is_ended_at_its_deadline(hooks: Hooks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks_module, "_DEADLINE", 0.05)
    seen: list[CheckpointEvent] = []

    async def hangs(_: CheckpointEvent) -> None:
        await asyncio.Event().wait()

    hooks.add(hangs)
    hooks.add(seen.append)
    hooks.emit(event())
    wait_until(lambda: told(seen, "hook.failing"))
    assert told(seen, "hook.failing")[0].error.type == "TimeoutError"  # type: ignore[union-attr]


def test_others_are_told_once_of_a_hook_that_does_not_come_back(
    hooks: Hooks, monkeypatch: pytest.MonkeyPatch, released: threading.Event
) -> None:
    monkeypatch.setattr(hooks_module, "_DEADLINE", 0.05)
    seen: list[CheckpointEvent] = []
    hooks.add(lambda _: released.wait(), name="hangs")
    hooks.add(seen.append)

    def is_told() -> bool:
        hooks.emit(event())
        return bool(told(seen, "hook.stuck"))

    wait_until(is_told)
    for _ in range(5):
        hooks.emit(event())
    wait_until(lambda: hooks._inbox.stats().queued == 0)
    assert len(told(seen, "hook.stuck")) == 1
    released.set()
    wait_until(lambda: told(seen, "hook.recovered"))


def test_emitting_after_close_is_silently_counted(hooks: Hooks) -> None:
    seen: list[CheckpointEvent] = []
    hooks.add(seen.append, name="seen")
    hooks.emit(event())
    hooks.close(5)
    hooks.emit(event("critical"))
    assert len(seen) == 1
    assert hooks.stats()["seen"] == HookStats(delivered=1, dropped_closed=1)
    with pytest.raises(ClosedError):
        hooks.add(seen.append)


def test_close_delivers_what_waits_and_closes_hooks_once_each(hooks: Hooks) -> None:
    class Closable:
        def __init__(self) -> None:
            self.log: list[str] = []

        def __call__(self, one: CheckpointEvent) -> None:
            time.sleep(0.01)
            self.log.append(one.name)

        async def close(self) -> None:
            self.log.append("closed")

    used, unused = Closable(), Closable()
    hooks.add(used)
    hooks.emit(event(name="a"))
    hooks.emit(event(name="b"))
    hooks.add(unused)
    hooks.close(5)
    hooks.close(5)
    assert used.log == ["a", "b", "closed"]
    assert unused.log == ["closed"]
    assert not [t for t in threading.enumerate() if t.name.startswith("checkpointer-hook-Closable")]


def test_close_gives_up_on_a_hook_that_hangs(hooks: Hooks, released: threading.Event) -> None:
    hooks.add(lambda _: released.wait(), name="hangs")
    hooks.emit(event())
    begun = time.monotonic()
    hooks.close(0.2)
    assert time.monotonic() - begun < 2


def test_a_hook_gets_nothing_after_it_is_unsubscribed(hooks: Hooks) -> None:
    first: list[CheckpointEvent] = []
    second: list[CheckpointEvent] = []
    unsubscribe = hooks.add(first.append)
    hooks.add(second.append)
    hooks.emit(event())
    assert hooks.flush(5)
    unsubscribe()
    unsubscribe()
    hooks.emit(event())
    assert hooks.flush(5)
    assert (len(first), len(second)) == (1, 2)
    assert list(hooks.stats()) == ["append-2"]


def test_a_forked_child_has_fresh_queues_and_delivers(hooks: Hooks, released: threading.Event) -> None:
    read_end, write_end = os.pipe()
    parent = os.getpid()

    def hook(one: CheckpointEvent) -> None:
        if os.getpid() == parent:
            released.wait()
        else:
            os.write(write_end, one.name.encode() + b"\n")

    hooks.add(hook, name="hook")
    hooks.emit(event(name="parent"))
    child = os.fork()
    if child == 0:
        hooks.emit(event(name="child"))
        delivered = hooks.flush(5) and hooks.stats()["hook"] == HookStats(delivered=1)
        hooks.close(5)
        os._exit(0 if delivered else 1)
    assert os.waitpid(child, 0)[1] == 0
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        assert pipe.read() == "child\n"


def test_events_just_before_the_process_ends_are_delivered() -> None:
    program = """
import time
from checkpointer.events import CheckpointEvent
from checkpointer.hooks import Hooks
def hook(event):
    time.sleep(0.2)
    print("delivered", flush=True)
hooks = Hooks()
hooks.add(hook)
hooks.emit(CheckpointEvent(name="flush.failed", severity="critical", message="m"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "delivered\n"


def test_nothing_is_started_at_import_or_without_events() -> None:
    program = """
import threading
from checkpointer.hooks import Hooks
import observability, observability.hooks.console
hooks = Hooks()
hooks.add(print)
assert threading.active_count() == 1, threading.enumerate()
"""
    subprocess.run([sys.executable, "-c", program], timeout=30, check=True)


def unreachable() -> Any:
    raise AssertionError("a factory must not connect")


CONTEXT = HookContext(unreachable, unreachable, "test", "test-hooks")


def test_the_standard_hooks_are_found_by_entry_point() -> None:
    hook = load_hook("console", CONTEXT)
    assert callable(hook)
    assert STANDARD_HOOKS == ("console", "thread_log", "run_events", "system_errors")


def test_an_unknown_hook_is_refused_with_the_known_names() -> None:
    with pytest.raises(ConfigurationError, match=r"no hook named 'consol'.*console.*system_errors"):
        load_hook("consol", CONTEXT)
