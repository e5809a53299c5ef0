"""Shows where the time of a put, a flush, a read and a graph goes: what a figure of the benchmarks is made of.

Run it: python -m benchmarks.where [--rounds 5]   (private servers, unless given)

*Put*: 50 tasks of one event loop put 20 checkpoints each, with one write each, and no flush beside them. *Flush*: what
they have put is then brought to Postgres. *Reads*: one thread's latest checkpoint, read 500 times, one after the other:
hot (Redis has it; with and without `verify_reads`), cold (only Postgres has it), by the stock saver, and by
`InMemorySaver`, which has nothing to do but decode. *Graphs*: 100 runs at a time of the graph of ten nodes in one event
loop, with this saver (whose flusher is at work, in its own thread) and with `InMemorySaver`.

Each is taken once without a profiler, for the time, and once with one, for its parts, so a part is `time x its share`;
a profiler makes small functions look dearer than they are. A *part* is a file of this saver, or what one library does.
Times are this process's processor time, so what is waited for is not in them; of reads and graphs, the whole time is
given too, and of graphs what the garbage collector took of the event loop's thread.
Calls of Python functions are exact, and the same on every machine.

Not here: comparisons with other savers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import gc
import sysconfig
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres import PostgresSaver

import checkpointer
from benchmarks import servers
from benchmarks.lab import Face
from benchmarks.loads.graphs import chain
from benchmarks.states import Run, messages
from checkpointer import BufferedPostgresSaver
from checkpointer.flush.session import Progress, Session

if TYPE_CHECKING:
    from langgraph.checkpoint.base import BaseCheckpointSaver

    from benchmarks.servers import Place

THREADS = 50
STEPS = 20
READS = 500
GRAPHS = 100
_PACKAGE = Path(checkpointer.__file__).parent
_SITE = Path(sysconfig.get_path("purelib"))
_LIBRARY = Path(sysconfig.get_path("stdlib"))
_SHOWN = 0.01


@dataclass
class Parts:
    """Own time and calls of the parts of some work."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    calls: Counter[str] = field(default_factory=Counter)

    def add(self, profile: cProfile.Profile) -> None:
        """Add what a profiler has seen."""
        for entry in profile.getstats():
            if not isinstance(entry.code, str):
                part = part_of(Path(entry.code.co_filename))
                self.seconds[part] += entry.inlinetime
                self.calls[part] += entry.callcount


def part_of(path: Path) -> str:
    """Name the part that a source file belongs to."""
    if path.is_relative_to(_PACKAGE):
        return str(path.relative_to(_PACKAGE.parent))
    if path.is_relative_to(_SITE):
        # `langgraph` is shared by packages, the next folder tells them apart.
        names = path.relative_to(_SITE).with_suffix("").parts
        return ".".join(names[: 3 if names[0] == "langgraph" else 1])
    if path.is_relative_to(_LIBRARY):
        return f"Python: {path.relative_to(_LIBRARY).with_suffix('').parts[0]}"
    if str(path).startswith("<frozen "):
        return "Python: importlib"
    return "Python: named tuples" if str(path) == "<string>" else "the caller"


async def put(saver: BufferedPostgresSaver, place: Place, profile: cProfile.Profile | None) -> float:
    """Put checkpoints and writes; returns the microseconds of processor time that this thread has spent on each."""
    runs = [Run(Face(saver, "async"), place.thread(), messages()) for _ in range(THREADS)]
    prepared = [[run.next_checkpoint() for _ in range(STEPS)] for run in runs]
    for run in runs:
        await run.start()

    async def go(run: Run, checkpoints: list[Any]) -> None:
        for checkpoint in checkpoints:
            await run.put(*checkpoint)
            await run.put_writes()

    gc.collect()
    begin = time.thread_time()
    with profile or contextlib.nullcontext():
        await asyncio.gather(*map(go, runs, prepared))
    return (time.thread_time() - begin) * 1e6 / (THREADS * STEPS)


async def flush(saver: BufferedPostgresSaver, profile: cProfile.Profile | None) -> float:
    """Bring everything to Postgres; returns the microseconds of this process for each checkpoint."""
    flusher = saver._core.flusher

    def work(session: Session) -> None:
        with profile or contextlib.nullcontext():
            flusher.flush_threads(session, flusher.ledger.threads(), None, Progress())

    begin = time.process_time()
    await asyncio.wrap_future(flusher.submit(work))  # in the flusher's thread: there is one profiler at a time
    report = await saver.aflush()
    if not report:
        raise RuntimeError(f"the flush has failed: {report}")
    return (time.process_time() - begin) * 1e6 / (THREADS * STEPS)


@dataclass
class Work:
    """Times and parts of one kind of work, in microseconds.

    Attributes:
        own: This thread's processor time, in each round.
        whole: The same with what is waited for.
        collecting: What the garbage collector took of it.
        parts: Where it goes.
    """

    own: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    collecting: list[float] = field(default_factory=list)
    parts: Parts = field(default_factory=Parts)

    def read(self, saver: BaseCheckpointSaver[Any], config: Any) -> None:
        """Read without a profiler, and with one."""
        saver.get_tuple(config)
        gc.collect()
        begin, own = time.perf_counter(), time.thread_time()
        for _ in range(READS):
            saver.get_tuple(config)
        self.own.append((time.thread_time() - own) * 1e6 / READS)
        self.whole.append((time.perf_counter() - begin) * 1e6 / READS)
        profile = cProfile.Profile(time.thread_time, builtins=False)
        with profile:
            for _ in range(READS):
                saver.get_tuple(config)
        self.parts.add(profile)

    async def run(self, saver: BaseCheckpointSaver[Any], place: Place) -> None:
        """Run graphs without a profiler, and with one."""
        graph = chain(saver)

        async def run_all() -> None:
            configs: list[Any] = [{"configurable": {"thread_id": place.thread()}} for _ in range(GRAPHS)]
            await asyncio.gather(*(graph.ainvoke({"messages": messages()}, config) for config in configs))

        thread, since, collecting = threading.get_ident(), 0.0, 0.0

        def note(phase: str, _: Any) -> None:
            nonlocal since, collecting
            if threading.get_ident() == thread:
                if phase == "stop":
                    collecting += time.thread_time() - since
                since = time.thread_time()

        gc.collect()
        gc.callbacks.append(note)
        begin, own = time.perf_counter(), time.thread_time()
        await run_all()
        self.own.append((time.thread_time() - own) * 1e6 / GRAPHS)
        self.whole.append((time.perf_counter() - begin) * 1e6 / GRAPHS)
        gc.callbacks.remove(note)
        self.collecting.append(collecting * 1e6 / GRAPHS)
        profile = cProfile.Profile(time.thread_time, builtins=False)
        with profile:
            await run_all()
        self.parts.add(profile)


async def graphs(place: Place, rounds: int) -> dict[str, Work]:
    """Have the savers take turns in running graphs."""
    async with BufferedPostgresSaver.from_conn_string(
        place.postgres_uri, redis_url=place.redis_url, prefix=place.prefix
    ) as ours:
        await ours.asetup()
        savers: dict[str, BaseCheckpointSaver[Any]] = {"graph": ours, "graph with InMemorySaver": InMemorySaver()}
        found = {kind: Work() for kind in savers}
        for number in range(rounds + 1):
            for kind, saver in savers.items():
                await (found[kind] if number else Work()).run(saver, place)  # the first warms up
                await ours.aflush()
        return found


def reads(place: Place, rounds: int) -> dict[str, Work]:
    """Have the kinds of reads take turns."""
    with contextlib.ExitStack() as stack:

        def ours(**more: Any) -> BufferedPostgresSaver:
            return stack.enter_context(
                BufferedPostgresSaver.from_conn_string(
                    place.postgres_uri, redis_url=place.redis_url, prefix=place.prefix, triggers=frozenset(), **more
                )
            )

        stock = stack.enter_context(PostgresSaver.from_conn_string(place.postgres_uri))
        kinds: dict[str, tuple[BaseCheckpointSaver[Any], BaseCheckpointSaver[Any]]] = {
            "hot read": (saver := ours(), saver),
            "hot read, unverified": (saver := ours(verify_reads=False), saver),
            "cold read": (stock, ours()),
            "read by the stock saver": (stock, stock),
            "read by InMemorySaver": (memory := InMemorySaver(), memory),
        }
        found = {kind: Work() for kind in kinds}
        configs = {kind: asyncio.run(_put_one(writer, place)) for kind, (writer, _) in kinds.items()}
        for number in range(rounds + 1):
            for kind, (_, reader) in kinds.items():
                (found[kind] if number else Work()).read(reader, configs[kind])  # the first warms up
        return found


async def _put_one(saver: BaseCheckpointSaver[Any], place: Place) -> Any:
    run = Run(Face(saver, "sync"), place.thread(), messages())
    for _ in range(2):
        await run.put(*run.next_checkpoint())
        await run.put_writes()
    return run.here


async def measure(place: Place, rounds: int) -> tuple[dict[str, list[float]], dict[str, Parts]]:
    """Measure in turns with and without a profiler; returns the times without, and the parts with."""
    times: dict[str, list[float]] = {"put": [], "flush": []}
    parts = {"put": Parts(), "flush": Parts()}

    def opened() -> Any:
        return BufferedPostgresSaver.from_conn_string(
            place.postgres_uri, redis_url=place.redis_url, prefix=place.prefix, triggers=frozenset()
        )

    for number in range(rounds + 1):
        async with opened() as saver:
            await saver.asetup()
            puts, flushed = await put(saver, place, None), await flush(saver, None)
        profile = cProfile.Profile(time.thread_time, builtins=False)
        flushing = cProfile.Profile(time.thread_time, builtins=False)
        async with opened() as saver:
            await saver.asetup()
            await put(saver, place, profile)
            await flush(saver, flushing)
        if number:  # the first warms up
            times["put"].append(puts)
            times["flush"].append(flushed)
            parts["put"].add(profile)
            parts["flush"].add(flushing)
    return times, parts


def table(name: str, microseconds: float, parts: Parts, each: int) -> str:
    """Write the parts of a work, done so many times, as Markdown."""
    total = sum(parts.seconds.values())
    lines = [f"| {name} | share | µs | calls |", "| --- | --- | --- | --- |"]
    rest_seconds = rest_calls = 0.0
    for part, seconds in sorted(parts.seconds.items(), key=lambda item: -item[1]):
        calls = parts.calls[part] / each
        if seconds < _SHOWN * total:
            rest_seconds += seconds
            rest_calls += calls
        else:
            lines.append(_row(part, seconds / total, microseconds, calls))
    lines.append(_row("others", rest_seconds / total, microseconds, rest_calls))
    lines.append(_row("**all**", 1.0, microseconds, parts.calls.total() / each))
    return "\n".join(lines)


def _row(part: str, share: float, microseconds: float, calls: float) -> str:
    return f"| {part} | {share:.0%} | {share * microseconds:.1f} | {calls:.1f} |"


def main() -> None:
    """Profile, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--postgres-uri")
    parser.add_argument("--redis-url")
    given = parser.parse_args()
    with servers.serve(given.postgres_uri, given.redis_url, None) as found, found.place() as place:
        for name, value in servers.describe(found).items():
            print(f"- {name}: {value}")
        times, parts = asyncio.run(measure(place, given.rounds))
        kinds = reads(place, given.rounds)
        runs = asyncio.run(graphs(place, given.rounds))
    for work, of in times.items():
        print(f"\n{table(work, min(of), parts[work], THREADS * STEPS * given.rounds)}")
    print("\n| read | whole time, µs | of that this process's processor time |\n| --- | --- | --- |")
    for kind, read in kinds.items():
        print(f"| {kind} | {min(read.whole):.0f} | {min(read.own):.0f} |")
    for kind, read in kinds.items():
        print(f"\n{table(kind, min(read.own), read.parts, READS * given.rounds)}")
    print("\n| graphs | whole time, µs | of that the event loop's thread | of that collecting garbage |")
    print("| --- | --- | --- | --- |")
    for kind, run in runs.items():
        print(f"| {kind} | {min(run.whole):.0f} | {min(run.own):.0f} | {min(run.collecting):.0f} |")
    for kind, run in runs.items():
        print(f"\n{table(kind, min(run.own), run.parts, GRAPHS * given.rounds)}")


if __name__ == "__main__":
    main()
