"""Compares the time of one `put`, `put_writes` and `get_tuple` with the stock `PostgresSaver` and with bare Redis.

Run it: python benchmarks/compare.py [--rounds 500]   (private servers, durable settings; prints Markdown)

The contenders take turns in one process, so that whatever else the machine does hits all of them. A *turn* is
`RUNS_PER_TURN` runs; a *run* is a thread of its own with `STEPS_PER_RUN` rounds; a *round* is one `put_writes`,
one `put` and one `get_tuple` of the thread's latest checkpoint, as an agent with 20 messages makes them. The time
between turns, in which what a turn has buffered is flushed, is not measured: background work of one contender
must not burden another. Within a turn the flusher works as in production.

*Round trips* are counted in a second part, by a proxy between client and server: one is a turn of the conversation,
from the client to the server and back.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import socket
import statistics
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import redis
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langgraph.checkpoint.base import Checkpoint, empty_checkpoint
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.postgres import PostgresSaver
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool

from checkpointer import BufferedPostgresSaver, embedded
from checkpointer.flush import run_end

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from langchain_core.runnables import RunnableConfig

STEPS_PER_RUN = 5
RUNS_PER_TURN = 5
MESSAGES = 20
OPERATIONS = ("put", "put_writes", "get_tuple")
HOOKS = ("console",)

POOL_SETTINGS = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}

LUA = """
redis.call('HSET', KEYS[1], unpack(ARGV))
local sequence = redis.call('INCR', KEYS[2])
redis.call('ZADD', KEYS[3], sequence, KEYS[1])
return sequence
"""


def messages() -> list[AnyMessage]:
    """Make a conversation that the serializer turns into about 5 KB."""
    kinds = (HumanMessage, AIMessage)
    return [kinds[i % 2](f"{i}: " + "the weather is fine. " * 4, id=str(uuid4())) for i in range(MESSAGES)]


@dataclass
class Run:
    """One thread on its way: what LangGraph would hand to a saver at each step."""

    saver: Any
    state: list[AnyMessage] = field(default_factory=messages)
    thread_id: str = field(default_factory=lambda: str(uuid4()))
    step: int = -1
    version: Any = None
    config: RunnableConfig = field(init=False)

    def __post_init__(self) -> None:
        self.config = {"configurable": {"thread_id": self.thread_id, "checkpoint_ns": ""}}
        self.put(*self.next_checkpoint())

    def next_checkpoint(self) -> tuple[Checkpoint, Any, Any]:
        """Return what `put` takes beside the config."""
        self.step += 1
        self.version = self.saver.get_next_version(self.version, None)
        versions = {"messages": self.version}
        checkpoint = {
            **empty_checkpoint(),
            "v": 4,  # as LangGraph's runs write them; with less, a read asks for the parent's writes too
            "id": str(uuid6(clock_seq=self.step)),
            "channel_values": {"messages": self.state},
            "channel_versions": versions,
            "versions_seen": {"model": versions},
        }
        return checkpoint, {"source": "loop", "step": self.step, "parents": {}}, versions  # type: ignore[return-value]

    def put(self, checkpoint: Checkpoint, metadata: Any, versions: Any) -> None:
        """Store the next checkpoint."""
        self.config = self.saver.put(self.config, checkpoint, metadata, versions)

    def put_writes(self) -> None:
        """Store what a task has written."""
        self.saver.put_writes(self.config, [("messages", self.state[-1])], "task-1")

    def get_tuple(self) -> None:
        """Read the thread's latest checkpoint."""
        found = self.saver.get_tuple({"configurable": {"thread_id": self.thread_id, "checkpoint_ns": ""}})
        assert len(found.checkpoint["channel_values"]["messages"]) == MESSAGES


class Contender:
    """A saver under test."""

    def __init__(self, name: str, saver: Any) -> None:
        self.name = name
        self.saver = saver
        self.times: dict[str, list[float]] = {operation: [] for operation in OPERATIONS}

    def turn(self) -> None:
        """Make some runs, and measure their operations."""
        for _ in range(RUNS_PER_TURN):
            run = Run(self.saver)
            run_id = uuid4()
            # What LangChain's callbacks tell at the start and the end of a graph's run: the end makes the saver flush.
            run_end.handler().on_chain_start({}, {}, run_id=run_id, metadata={"thread_id": run.thread_id})
            for _ in range(STEPS_PER_RUN):
                checkpoint = run.next_checkpoint()
                self.measure("put_writes", run.put_writes)
                self.measure("put", lambda run=run, checkpoint=checkpoint: run.put(*checkpoint))
                self.measure("get_tuple", run.get_tuple)
            run_end.handler().on_chain_end({}, run_id=run_id)
        if isinstance(self.saver, BufferedPostgresSaver) and not self.saver.flush():
            raise RuntimeError("the flush has failed")

    def measure(self, operation: str, call: Callable[[], object]) -> None:
        """Call, and note the time."""
        begin = time.perf_counter()
        call()
        self.times[operation].append(time.perf_counter() - begin)


class BareRedis:
    """One Lua call with the bytes that a put sends, serialised beforehand: what no put through Redis can beat."""

    name = "one Lua call to Redis, same bytes"

    def __init__(self, client: redis.Redis, serde: Any) -> None:
        self.client = client
        self.sha = client.script_load(LUA)
        self.fields: list[Any] = ["blob", serde.dumps_typed(messages())[1], "checkpoint", b"c" * 500]
        self.size = len(self.fields[1])
        self.times: dict[str, list[float]] = {operation: [] for operation in OPERATIONS}

    def turn(self) -> None:
        """Make as many calls as a saver makes puts."""
        for _ in range(RUNS_PER_TURN * STEPS_PER_RUN):
            key = str(uuid4())
            begin = time.perf_counter()
            self.client.evalsha(self.sha, 3, "{bare}" + key, "{bare}sequence", "{bare}dirty", *self.fields)
            self.times["put"].append(time.perf_counter() - begin)


class CountingProxy:
    """Passes bytes between clients and a server, and counts how often the conversation turns to the server."""

    def __init__(self, port: int) -> None:
        self.turns = 0
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            spoke = {"server": True}
            for source, target, name in ((client, server, "client"), (server, client, "server")):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._pass_on, args=(source, target, name, spoke), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, name: str, spoke: dict[str, bool]) -> None:
        # An error is an end as well: the other direction has closed both sockets.
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 20):
                if name == "server":
                    spoke["server"] = True
                elif spoke["server"]:
                    spoke["server"] = False
                    self.turns += 1
                target.sendall(data)
        source.close()
        target.close()

    def close(self) -> None:
        """Accept no more connections."""
        self._listener.close()


def buffered(postgres_uri: str, redis_url: str, prefix: str, **options: Any) -> BufferedPostgresSaver:
    """Make a saver of ours with the hooks that are used here."""
    return BufferedPostgresSaver.from_conn_string(
        postgres_uri, redis_url=redis_url, prefix=prefix, hooks=HOOKS, **options
    )


@contextmanager
def stock_on_pool(uri: str) -> Iterator[PostgresSaver]:
    """Make a stock saver on a pool."""
    with ConnectionPool(uri, kwargs=POOL_SETTINGS, min_size=2, max_size=10) as pool:
        yield PostgresSaver(pool)  # type: ignore[arg-type]


def count_round_trips(servers: embedded.Servers) -> dict[str, dict[str, tuple[float, float]]]:
    """Count round trips to Redis and to Postgres for each operation, with no flusher beside it."""
    counted: dict[str, dict[str, tuple[float, float]]] = {}
    with ExitStack() as stack:
        to_redis, to_postgres = CountingProxy(servers.valkey.port), CountingProxy(servers.postgres.port)
        stack.callback(to_redis.close)
        stack.callback(to_postgres.close)
        redis_url = servers.redis_url.replace(str(servers.valkey.port), str(to_redis.port))
        uri = servers.postgres_uri.replace(str(servers.postgres.port), str(to_postgres.port))
        ours = stack.enter_context(buffered(uri, redis_url, "count", triggers=frozenset()))
        one = stack.enter_context(PostgresSaver.from_conn_string(uri))
        pooled = stack.enter_context(stock_on_pool(uri))
        for name, saver in ((OURS, ours), (STOCK, one), (POOLED, pooled)):
            warm = Run(saver)
            for _ in range(20):
                warm.put_writes()
                warm.put(*warm.next_checkpoint())
                warm.get_tuple()
            counted[name] = {}
            run = Run(saver)
            for operation in OPERATIONS:
                times = 20
                before = to_redis.turns, to_postgres.turns
                for _ in range(times):
                    if operation == "put":
                        run.put(*run.next_checkpoint())
                    else:
                        getattr(run, operation)()
                counted[name][operation] = (
                    (to_redis.turns - before[0]) / times,
                    (to_postgres.turns - before[1]) / times,
                )
    return counted


OURS = "BufferedPostgresSaver"
NO_FLUSHER = "BufferedPostgresSaver, triggers=frozenset()"
UNVERIFIED = "BufferedPostgresSaver, verify_reads=False"
STOCK = "PostgresSaver, one connection"
POOLED = "PostgresSaver, pool"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=500, help="how often each operation is measured")
    rounds = parser.parse_args().rounds
    with ExitStack() as stack:
        servers = stack.enter_context(embedded.servers())
        uri, url = servers.postgres_uri, servers.redis_url
        ours = stack.enter_context(buffered(uri, url, "ours"))
        ours.setup()
        bare = BareRedis(stack.enter_context(redis.Redis.from_url(url, protocol=2)), ours.serde)
        contenders = [
            Contender(OURS, ours),
            Contender(NO_FLUSHER, stack.enter_context(buffered(uri, url, "idle", triggers=frozenset()))),
            Contender(UNVERIFIED, stack.enter_context(buffered(uri, url, "unverified", verify_reads=False))),
            Contender(STOCK, stack.enter_context(PostgresSaver.from_conn_string(uri))),
            Contender(POOLED, stack.enter_context(stock_on_pool(uri))),
            bare,
        ]
        load = os.getloadavg()[0]
        for contender in contenders:  # warm: connections, scripts, prepared statements
            contender.turn()
            contender.times = {operation: [] for operation in OPERATIONS}
        turns = -(-rounds // (RUNS_PER_TURN * STEPS_PER_RUN))
        for number in range(turns):
            for place in range(len(contenders)):
                contenders[(number + place) % len(contenders)].turn()
        print_machine(uri, url)
        print(f"- State: {MESSAGES} messages, {bare.size} bytes serialised; synchronous calls; hooks {HOOKS}")
        print(f"- {turns * RUNS_PER_TURN * STEPS_PER_RUN} rounds; load of the machine before the start {load:.1f}\n")
        print_times(contenders)
        print_round_trips(count_round_trips(servers))


def print_machine(uri: str, url: str) -> None:
    """Print what the figures were measured on."""
    with psycopg.connect(uri) as conn, redis.Redis.from_url(url) as client:
        settings = [
            f"{name} {conn.execute(f'SHOW {name}'.encode()).fetchone()[0]}"  # type: ignore[index]
            for name in ("server_version", "fsync", "synchronous_commit")
        ]
        info: Any = client.info("server")
        fsync: Any = client.config_get("append*")
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    model = models[0].partition(":")[2].strip() if models else platform.processor()
    packages = ("langgraph", "langgraph-checkpoint-postgres", "psycopg", "redis")
    print(f"- Machine: {os.cpu_count()} CPUs, {model or 'unknown'}, {platform.system()} {platform.machine()}")
    print(f"- Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in packages))
    print(f"- PostgreSQL: {', '.join(settings)}")
    name, number = ("Valkey", info["valkey_version"]) if "valkey_version" in info else ("Redis", info["redis_version"])
    print(f"- {name} {number}: appendonly {fsync['appendonly']}, appendfsync {fsync['appendfsync']}")


def print_times(contenders: list[Any]) -> None:
    """Print medians and 99th percentiles, and the ratio of each median to that of `OURS`."""
    print("| milliseconds: median / p99 (median relative to the first row) | " + " | ".join(OPERATIONS) + " |")
    print("|---" * (len(OPERATIONS) + 1) + "|")
    base = {operation: statistics.median(contenders[0].times[operation]) for operation in OPERATIONS}
    for contender in contenders:
        cells = []
        for operation in OPERATIONS:
            times = contender.times[operation]
            if not times:
                cells.append("–")  # noqa: RUF001
                continue
            median, p99 = statistics.median(times), statistics.quantiles(times, n=100)[98]
            cells.append(f"{median * 1e3:.2f} / {p99 * 1e3:.2f} ({median / base[operation]:.2f}×)")  # noqa: RUF001
        print(f"| {contender.name} | " + " | ".join(cells) + " |")


def print_round_trips(counted: dict[str, dict[str, tuple[float, float]]]) -> None:
    """Print the round trips."""
    print("\n| round trips: to Redis + to Postgres | " + " | ".join(OPERATIONS) + " |")
    print("|---" * (len(OPERATIONS) + 1) + "|")
    for name, by_operation in counted.items():
        cells = [f"{by_operation[operation][0]:g} + {by_operation[operation][1]:g}" for operation in OPERATIONS]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
