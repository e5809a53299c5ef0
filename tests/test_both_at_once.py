"""A read asks both servers at once, and misses nothing that moves from one to the other between the answers."""

from __future__ import annotations

import asyncio
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from helpers import wait_until
from langgraph.checkpoint.postgres import PostgresSaver
from proxy import Proxy, proxied
from test_round_trips import checkpoint, thread

from checkpointer import BufferedPostgresSaver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TTL = 1.0


@dataclass
class Pair:
    """A saver that reads through proxies, and one that writes directly."""

    reader: BufferedPostgresSaver
    writer: BufferedPostgresSaver
    redis: Proxy
    postgres: Proxy
    second: str = ""

    def put(self, saver: BufferedPostgresSaver, step: int, parent: str | None) -> str:
        found, metadata, new = checkpoint(step)
        saver.put(thread(parent), found, metadata, found["channel_versions"] if parent is None else new)
        saver.put_writes(thread(found["id"]), [("messages", step)], "task")
        return str(found["id"])

    def read_while(self, meanwhile: Callable[[], None], *, asynchronous: bool = False) -> Any:
        """Read; Postgres has answered and Redis has not been asked when `meanwhile` is called."""
        for _ in range(7):  # whatever is prepared is prepared then
            self.reader.get_tuple(thread())
        answered = threading.Event()
        held = self.redis.hold(b"f:t\r\n", reply=False)
        self.postgres.trap(b"t\0", answered.set, on="reply")
        found: list[Any] = []

        def read() -> None:
            if asynchronous:
                found.append(asyncio.run(self._aread()))
            else:
                found.append(self.reader.get_tuple(thread()))

        reading = threading.Thread(target=read)
        reading.start()
        assert held.taken.wait(20)
        assert answered.wait(20)
        meanwhile()
        held.release()
        reading.join(20)
        return found[0]

    async def _aread(self) -> Any:
        try:
            return await self.reader.aget_tuple(thread())
        finally:
            await self.reader._core._aclose_loop()


@pytest.fixture
def pair(postgres_uri: str, redis_url: str, prefix: str) -> Iterator[Pair]:
    settings: Any = {"prefix": prefix, "hooks": (), "triggers": frozenset(), "clean_ttl": TTL, "redis_timeout": 20.0}
    with ExitStack() as stack:
        uri, postgres = stack.enter_context(proxied(postgres_uri))
        url, buffer = stack.enter_context(proxied(redis_url))
        reader = BufferedPostgresSaver.from_conn_string(uri, redis_url=url, **settings)
        writer = BufferedPostgresSaver.from_conn_string(postgres_uri, redis_url=redis_url, **settings)
        reader.setup()
        reader.get_tuple({"configurable": {"thread_id": "another"}})  # connects
        yield Pair(stack.enter_context(reader), stack.enter_context(writer), buffer, postgres)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("knows", ["has put", "knows nothing"])
def test_a_checkpoint_that_was_flushed_between_the_answers_is_found(pair: Pair, knows: str, asynchronous: bool) -> None:
    first = pair.put(pair.reader if knows == "has put" else pair.writer, 0, None)
    assert pair.reader.flush()

    def move() -> None:
        pair.second = pair.put(pair.writer, 1, first)
        assert pair.writer.flush()

    found = pair.read_while(move, asynchronous=asynchronous)
    assert found.config["configurable"]["checkpoint_id"] == pair.second
    assert found.checkpoint["channel_values"]["messages"] == ["messages"] * 50
    assert found.pending_writes == [("task", "messages", 1)]


@pytest.mark.parametrize("forgotten", ["all of it", "all but the name of the latest"])
def test_one_that_redis_has_forgotten_again_by_then_is_found(pair: Pair, forgotten: str) -> None:
    first = pair.put(pair.writer, 0, None)
    assert pair.writer.flush()
    client = pair.writer._core.redis.client()
    keys = pair.writer._core.commands.layout.thread("t")
    client.delete(keys.clean, keys.facts, keys.writes)

    def move() -> None:
        pair.second = pair.put(pair.writer, 1, first)
        assert pair.writer.flush()
        if forgotten == "all of it":
            wait_until(lambda: not client.exists(keys.clean, keys.facts, keys.writes), timeout=20)
        else:
            client.delete(keys.clean, keys.writes)

    found = pair.read_while(move)
    assert found.config["configurable"]["checkpoint_id"] == pair.second
    assert found.pending_writes == [("task", "messages", 1)]


def test_what_a_stock_writer_has_added_to_a_checkpoint_that_is_only_buffered_is_found(
    pair: Pair, postgres_uri: str
) -> None:
    first = pair.put(pair.writer, 0, None)
    assert pair.writer.flush()
    second = pair.put(pair.writer, 1, first)
    with PostgresSaver.from_conn_string(postgres_uri) as stock:
        stock.put_writes(thread(second), [("messages", "stock")], "task-2")
    found = pair.reader.get_tuple(thread())
    assert found is not None
    assert found.pending_writes == [("task", "messages", 1), ("task-2", "messages", "stock")]


def test_writes_of_the_head_that_were_flushed_between_the_answers_are_found(pair: Pair) -> None:
    first = pair.put(pair.writer, 0, None)
    assert pair.writer.flush()

    def move() -> None:
        pair.writer.put_writes(thread(first), [("messages", "more")], "task-2")
        assert pair.writer.flush()

    found = pair.read_while(move)
    assert found.pending_writes == [("task", "messages", 0), ("task-2", "messages", "more")]
