"""Has contenders take turns, so that whatever else the machine does hits all of them.

Not here: what a turn is (`loads/`). A *face* is one saver called in one mode, through the same awaitable methods for
both. Between turns a saver's background work is finished, outside of what is measured: work of one contender must
not burden another.
"""

from __future__ import annotations

import contextlib
import gc
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import redis
from langgraph.checkpoint.postgres import PostgresSaver

from benchmarks.contenders import CONTENDERS, LOCK_FREE, MEMORY, OURS, POOLED, STOCK, Contender, Mode
from benchmarks.measure import Results
from checkpointer import BufferedPostgresSaver
from checkpointer.flush import run_end

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
    from uuid import UUID

    from benchmarks.scale import Scale
    from benchmarks.servers import Place, Servers


class Face:
    """See the module.

    Attributes:
        saver: The saver.
    """

    def __init__(self, saver: Any, mode: Mode) -> None:
        self.saver = saver
        self._is_sync = mode == "sync"
        self.put = self._awaitable("put")
        self.put_writes = self._awaitable("put_writes")
        self.get_tuple = self._awaitable("get_tuple")
        self.delete_thread = self._awaitable("delete_thread")

    def _awaitable(self, name: str) -> Callable[..., Awaitable[Any]]:
        if not self._is_sync:
            found: Callable[..., Awaitable[Any]] = getattr(self.saver, f"a{name}")
            return found
        call = getattr(self.saver, name)

        async def called(*args: Any, **kwargs: Any) -> Any:
            return call(*args, **kwargs)

        return called

    async def latest(self, config: Any, limit: int) -> int:
        """Read a thread's latest checkpoints, and count them."""
        if self._is_sync:
            return sum(1 for _ in self.saver.list(config, limit=limit))
        return len([found async for found in self.saver.alist(config, limit=limit)])

    async def settle(self) -> None:
        """Finish what the saver has to do in the background."""
        if isinstance(self.saver, BufferedPostgresSaver):
            report = self.saver.flush() if self._is_sync else await self.saver.aflush()
            if not report:
                raise RuntimeError(f"the flush has failed: {report}")


@dataclass
class Lane:
    """A contender that is open."""

    contender: Contender
    face: Face
    has_failed: bool = False

    @property
    def key(self) -> str:
        """The contender's key."""
        return self.contender.key

    @property
    def is_ours(self) -> bool:
        """Whether it is our saver."""
        return self.contender.kind == "ours"


class Lab:
    """What a load gets: servers, scale, and where to note results.

    Args:
        servers: The servers.
        scale: How much to do.
        say: Told what is going on.
    """

    def __init__(self, servers: Servers, scale: Scale, say: Callable[[str], None]) -> None:
        self.servers = servers
        self.scale = scale
        self.say = say
        self.results = Results()
        with redis.Redis.from_url(servers.redis_url) as client:
            facts: Any = client.info("replication")
            self._can_wait_for_disk = bool(client.command_list(pattern="waitaof"))
        self._has_replica = bool(facts.get("connected_slaves"))

    @asynccontextmanager
    async def lanes(
        self, load: str, place: Place, keys: Iterable[str], mode: Mode, **own: Contender
    ) -> AsyncIterator[list[Lane]]:
        """Open contenders; those that cannot be measured are left out, and it is noted."""
        opened: list[Lane] = []
        async with AsyncExitStack() as stack:
            for contender in [*(CONTENDERS[key] for key in keys), *own.values()]:
                if reason := self._why_not(contender, place):
                    self.results.remark(reason)
                    continue
                try:
                    saver = await stack.enter_async_context(contender.open(place, mode))
                except Exception as exc:  # noqa: BLE001 - a peer that does not work is a result, not the end
                    self._leave_out(contender, load, exc)
                    continue
                opened.append(Lane(contender, Face(saver, mode)))
            # What there is by now stays: the collections between turns need not look at it.
            gc.collect()
            gc.freeze()
            yield opened
            gc.unfreeze()

    def usual(self) -> list[str]:
        """Return who takes part in a load that is not about a few of them."""
        if self.scale.is_smoke:
            return [OURS, STOCK, POOLED, LOCK_FREE, MEMORY]
        return [key for key, found in CONTENDERS.items() if not found.is_slow]

    @contextlib.contextmanager
    def stock(self, place: Place) -> Iterator[Face]:
        """Open a stock saver that writes what is there before a load begins."""
        with PostgresSaver.from_conn_string(place.postgres_uri) as saver:
            saver.setup()
            yield Face(saver, "sync")

    def _why_not(self, contender: Contender, place: Place) -> str | None:
        if contender.key == "ours, replicated" and not self._has_replica:
            return f"{contender.name} is left out: Redis has no replica"
        if contender.key == "ours, fsynced" and not self._can_wait_for_disk:
            return f"{contender.name} is left out: it needs Redis 7.2 or Valkey"
        return contender.why_not(place)

    def _leave_out(self, contender: Contender, load: str, exc: BaseException) -> None:
        text = f"{contender.name} could not do the load {load}: {type(exc).__name__}: {str(exc).partition(chr(10))[0]}"
        self.say(text)
        self.results.remark(text)

    async def take_turns(
        self,
        load: str,
        lanes: Sequence[Lane],
        rounds: int,
        turn: Callable[[Lane], Awaitable[object]],
        *,
        first: int = 0,
    ) -> None:
        """Have each lane take its turn in each round, in an order that rotates; `first` is the first round's number.

        A contender that fails is left out from then on, and it is noted.
        """
        for number in range(first, first + rounds):
            for place in range(len(lanes)):
                lane = lanes[(number + place) % len(lanes)]
                if lane.has_failed:
                    continue
                gc.collect()
                try:
                    await turn(lane)
                    await lane.face.settle()
                except Exception as exc:  # noqa: BLE001 - see `lanes`
                    self._leave_out(lane.contender, load, exc)
                    lane.has_failed = True

    async def warm_up(self, load: str, lanes: Sequence[Lane], turn: Callable[[Lane], Awaitable[object]]) -> None:
        """Have each lane take a turn that does not count: connections, scripts, prepared statements."""
        with self.results.warm_up():
            await self.take_turns(load, lanes, 1, turn)

    async def timed(self, load: str, key: str, call: Callable[[], Awaitable[Any]], at: float = 0) -> Any:
        """Await a call, and note how many milliseconds it took."""
        begin = time.perf_counter()
        found = await call()
        self.results.note(load, key, (time.perf_counter() - begin) * 1e3, at=at)
        return found


@contextlib.contextmanager
def root_run(thread_id: str, run_id: UUID) -> Iterator[None]:
    """Tell what LangChain's callbacks tell at the start and the end of a graph's run: the end makes ours flush."""
    run_end.handler().on_chain_start({}, {}, run_id=run_id, metadata={"thread_id": thread_id})
    try:
        yield
    finally:
        run_end.handler().on_chain_end({}, run_id=run_id)
