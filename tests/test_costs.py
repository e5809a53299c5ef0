"""What an operation costs that can be counted exactly: serialisations, bytes, function calls. No time is measured."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from proxy import proxied
from test_round_trips import checkpoint, thread

from checkpointer import BufferedPostgresSaver, records

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from proxy import Proxy

# Functions of Python and of C, below ours too; 300, 200 and 395 when this was written. Other versions of what is below
# may make some more.
MOST_CALLS = {"put": 330, "put_writes": 230, "get_tuple": 430}


@pytest.fixture
def wired(postgres_uri: str, redis_url: str, prefix: str) -> Iterator[tuple[BufferedPostgresSaver, Proxy]]:
    with ExitStack() as stack:
        url, proxy = stack.enter_context(proxied(redis_url))
        saver = stack.enter_context(
            BufferedPostgresSaver.from_conn_string(
                postgres_uri, redis_url=url, prefix=prefix, hooks=(), triggers=frozenset()
            )
        )
        saver.setup()
        yield saver, proxy


def warm(saver: BufferedPostgresSaver) -> Any:
    """Open connections and the thread, prepare what is prepared; returns the id of the latest checkpoint."""
    for step in range(3):
        first, metadata, new = checkpoint(step)
        saver.put(thread(), first, metadata, first["channel_versions"] if not step else new)
        saver.put_writes(thread(first["id"]), [("messages", ["x"])], "task")
        saver.get_tuple(thread())
    return first["id"]


def test_a_put_serialises_each_value_that_has_changed_once_and_nothing_else(
    wired: tuple[BufferedPostgresSaver, Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, _ = wired
    last = warm(saver)
    dumped: list[Any] = []
    dumps = JsonPlusSerializer.dumps_typed

    def counted(self: JsonPlusSerializer, value: Any) -> tuple[str, bytes]:
        dumped.append(value)
        return dumps(self, value)

    monkeypatch.setattr(JsonPlusSerializer, "dumps_typed", counted)
    found, metadata, new = checkpoint(3, changed=("plan",))
    saver.put(thread(last), found, metadata, new)
    assert dumped == [["plan"] * 50]
    dumped.clear()
    saver.put_writes(thread(found["id"]), [("messages", ["x"]), ("plan", 1)], "task")
    assert dumped == [["x"], 1]


def test_values_without_non_finite_numbers_are_not_walked(
    wired: tuple[BufferedPostgresSaver, Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, _ = wired
    last = warm(saver)

    def walk(*_: Any) -> Any:
        raise AssertionError("a value was walked")

    monkeypatch.setattr(records, "sanitize_value", walk)
    found, metadata, new = checkpoint(3)
    found["channel_values"]["messages"] = [{"text": "x", "score": 1.5, "nested": [0.1, None, {"a": (1e300,)}]}]
    saver.put(thread(last), found, metadata, new)
    saver.put_writes(thread(found["id"]), [("messages", found["channel_values"]["messages"])], "task")
    found, metadata, new = checkpoint(4)
    found["channel_values"]["messages"] = [{"score": float("nan")}]
    with pytest.raises(AssertionError, match="walked"):
        saver.put(thread(last), found, metadata, new)


def test_a_put_sends_what_has_changed_whatever_the_size_of_the_rest(
    wired: tuple[BufferedPostgresSaver, Proxy],
) -> None:
    saver, proxy = wired
    sent = {}
    for size in (5_000, 5_000_000):
        config: Any = {"configurable": {"thread_id": f"t{size}", "checkpoint_ns": ""}}
        for step in range(3):
            found, metadata, new = checkpoint(step, changed=("plan",))
            found["channel_values"]["files"] = ["x" * size]
            before = proxy.request_bytes
            config = saver.put(config, found, metadata, found["channel_versions"] if not step else new)
            sent[size, step] = proxy.request_bytes - before
    assert sent[5_000_000, 0] > 5_000_000
    assert sent[5_000, 2] < 2_500
    # The thread's id is three characters longer, in each of its keys and once more.
    assert sent[5_000_000, 2] - sent[5_000, 2] < 50


def calls_of(operation: Callable[[], Any]) -> int:
    """Count the calls of functions, of C functions too, that an operation makes in this thread."""
    count = 0

    def note(_frame: Any, event: str, _arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        operation()
    finally:
        sys.setprofile(None)
    return count


def test_the_operations_of_a_hot_thread_make_few_calls(wired: tuple[BufferedPostgresSaver, Proxy]) -> None:
    saver, _ = wired
    last = warm(saver)
    found, metadata, new = checkpoint(3)
    made = {
        "put": calls_of(lambda: saver.put(thread(last), found, metadata, new)),
        "put_writes": calls_of(lambda: saver.put_writes(thread(found["id"]), [("messages", ["x"])], "task")),
        # The pool may give a connection on which the statement has yet to be prepared.
        "get_tuple": min(calls_of(lambda: saver.get_tuple(thread())) for _ in range(5)),
    }
    assert all(made[name] <= most for name, most in MOST_CALLS.items()), made


def test_the_number_of_calls_does_not_grow_with_the_state(wired: tuple[BufferedPostgresSaver, Proxy]) -> None:
    saver, _ = wired
    made = {}
    for size in (10, 10_000):
        config: Any = {"configurable": {"thread_id": f"t{size}", "checkpoint_ns": ""}}
        for step in range(3):
            found, metadata, new = checkpoint(step)
            found["channel_values"]["messages"] = [{"role": "user", "content": "hello", "score": 1.5}] * size
            made[size] = calls_of(lambda: saver.put(config, found, metadata, new))  # noqa: B023 - called at once
            config = thread(found["id"]) | {"configurable": {**config["configurable"], "checkpoint_id": found["id"]}}
    assert abs(made[10_000] - made[10]) < 20, made
