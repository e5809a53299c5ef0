"""How much of everything a run does: the smoke run, the usual one, the long one.

Not here: what is done (`loads/`).
"""

from __future__ import annotations

from dataclasses import dataclass

KB, MB = 1 << 10, 1 << 20

STATE = 5 * KB
"""The size of a state where nothing else is said: 20 messages."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """See the module.

    Attributes:
        rounds: Turns of each contender where single operations are measured.
        steps: Checkpoints of each turn.
        sizes: Sizes of states, in bytes.
        large_rounds: Turns at sizes of 100 KB and more.
        concurrency: Numbers of concurrent threads.
        burst: Checkpoints of one burst, if that leaves each thread as many as it has to have.
        burst_steps: Checkpoints that each thread makes at least.
        burst_rounds: Bursts of each contender.
        sustained_seconds: How long a sustained load is watched.
        sustained_rounds: How often.
        graphs: Concurrent runs of the graph of ten nodes.
        other_graphs: Concurrent runs of each of the others.
        graph_rounds: How often they are made.
        backlog: Checkpoints that wait when a flush is measured.
        backlog_rounds: How often.
        histories: Lengths of threads.
        history_rounds: Turns at each of them.
        channel_bytes: Sizes of the state of which one small channel changes.
        channel_rounds: Turns at each of them.
        latencies: Milliseconds that the network adds to each round trip.
        network_rounds: Turns at each of them.
        memory_threads: Threads whose memory is measured.
        events: Events emitted.
        is_smoke: Whether most loads are left to those that targets are about.
    """

    rounds: int = 20
    steps: int = 5
    sizes: tuple[int, ...] = (KB, STATE, 100 * KB, MB, 10 * MB)
    large_rounds: int = 2
    concurrency: tuple[int, ...] = (1, 10, 50, 200, 1000)
    burst: int = 1_000
    burst_steps: int = 2
    burst_rounds: int = 3
    sustained_seconds: float = 10.0
    sustained_rounds: int = 1
    graphs: int = 100
    other_graphs: int = 25
    graph_rounds: int = 3
    backlog: int = 10_000
    backlog_rounds: int = 3
    histories: tuple[int, ...] = (10, 1_000, 100_000)
    history_rounds: int = 30
    channel_bytes: tuple[int, ...] = (STATE, 10 * MB)
    channel_rounds: int = 10
    latencies: tuple[float, ...] = (0.0, 0.5, 2.0)
    network_rounds: int = 10
    memory_threads: int = 500
    events: int = 2_000
    is_smoke: bool = False


DEFAULT = Scale()

FULL = Scale(
    rounds=100,
    large_rounds=10,
    burst=3_000,
    burst_steps=5,
    burst_rounds=7,
    sustained_seconds=20.0,
    sustained_rounds=3,
    graph_rounds=7,
    backlog_rounds=5,
    history_rounds=100,
    channel_rounds=30,
    network_rounds=30,
    memory_threads=2_000,
    events=10_000,
)

QUICK = Scale(
    rounds=1,
    steps=3,
    sizes=(STATE, 100 * KB),
    large_rounds=1,
    concurrency=(50,),
    burst=50,
    burst_steps=1,
    burst_rounds=1,
    sustained_seconds=0.3,
    graphs=1,
    other_graphs=1,
    graph_rounds=1,
    backlog=100,
    backlog_rounds=1,
    histories=(10, 500),
    history_rounds=1,
    channel_bytes=(STATE, 100 * KB),
    channel_rounds=1,
    latencies=(0.0, 2.0),
    network_rounds=1,
    memory_threads=10,
    events=20,
    is_smoke=True,
)
"""Shows that everything works; its numbers mean nothing."""
