"""What the saver should reach, as data: which measures are divided by which, and how large the ratio may be.

Not here: measuring. A target that is missed is shown as missed, and one that could not be measured counts as missed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.contenders import COPY, LOCK_FREE, LUA, MEMORY, OURS, PING, POOLED, STOCK, UNVERIFIED
from benchmarks.scale import KB, MB, STATE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.measure import Measures

Wanted = Literal["at most", "at least"]


@dataclass(frozen=True, slots=True)
class Row:
    """One target, and what was measured.

    Attributes:
        name: What it is about.
        wanted: Whether the ratio has to be at most or at least the limit.
        limit: The limit.
        of: What the ratio is relative to, or the unit of an absolute figure.
        measured: The figures, for readers.
        ratio: What is compared with the limit; None if something was not measured.
        met: Whether the target is met.
    """

    name: str
    wanted: Wanted
    limit: float
    of: str
    measured: str
    ratio: float | None
    met: bool


def judge(name: str, wanted: Wanted, limit: float, of: str, measured: str, ratio: float | None) -> Row:
    """Compare a ratio with its limit."""
    met = ratio is not None and (ratio <= limit if wanted == "at most" else ratio >= limit)
    return Row(name, wanted, limit, of, measured if ratio is not None else "not measured", ratio, met)


def ratio_of(a: float | None, b: float | None) -> float | None:
    """Divide, if there is something to divide and to divide by."""
    return None if a is None or not b else a / b


def _compare(
    name: str,
    wanted: Wanted,
    limit: float,
    of: str,
    a: float | None,
    b: float | None,
    show: Callable[[float], str],
) -> Row:
    measured = f"{show(a)} against {show(b)}" if a is not None and b is not None else ""
    return judge(name, wanted, limit, of, measured, ratio_of(a, b))


def _ms(value: float) -> str:
    return f"{value:,.3f} ms" if value < 10 else f"{value:,.0f} ms"


def _rate(value: float) -> str:
    return f"{value:,.0f}/s"


def _least(*values: float | None) -> float | None:
    return min((value for value in values if value is not None), default=None)


def rows(measures: Measures) -> list[Row]:
    """Return the targets in the order in which they were set."""
    return [
        *_operations(measures),
        *_concurrent(measures),
        *_backlog(measures),
        *_graphs(measures),
        *_sizes(measures),
        *_memory(measures),
        *_network(measures),
    ]


def _operations(found: Measures) -> Iterator[Row]:
    for operation in ("put", "put_writes"):
        mine = found.median(operation, OURS, STATE)
        bare, stock = found.median(operation, LUA, STATE), found.median(operation, STOCK, STATE)
        yield _compare(operation, "at most", 1.3, "one bare Lua call with the same bytes", mine, bare, _ms)
        yield _compare(operation, "at most", 0.45, "stock on one connection", mine, stock, _ms)
    stock = found.median("get_tuple", STOCK, STATE)
    for key, name, limit in ((UNVERIFIED, "verify_reads=False", 0.35), (OURS, "verify_reads=True", 0.6)):
        mine = found.median("get_tuple", key, STATE)
        yield _compare(f"hot get_tuple, {name}", "at most", limit, "stock on one connection", mine, stock, _ms)


def _concurrent(found: Measures) -> Iterator[Row]:
    for load, states in (("burst", "states made before"), ("burst, made", "states made by the caller")):
        mine = found.median(load, OURS, 50)
        for key, limit, of in (
            (POOLED, 10, "stock on a pool"),
            (LOCK_FREE, 6, "stock without its lock"),
            (MEMORY, 0.65, "InMemorySaver"),
        ):
            other = found.median(load, key, 50)
            yield _compare(f"50 concurrent threads, burst, {states}", "at least", limit, of, mine, other, _rate)
    mine, stock = found.median("sustained", OURS), found.median("sustained", POOLED)
    yield _compare("50 concurrent threads, sustained", "at least", 5, "stock on a pool", mine, stock, _rate)


def _backlog(found: Measures) -> Iterator[Row]:
    mine = found.median("flush", OURS)
    for key, limit, of in ((STOCK, 8, "stock's serial rate"), (COPY, 0.4, "a bare COPY of the same rows")):
        yield _compare("flush of a backlog", "at least", limit, of, mine, found.median("flush", key), _rate)


def _graphs(found: Measures) -> Iterator[Row]:
    load = "graph, 10 nodes"
    at = max(found.points(load), default=0)
    mine, memory = found.median(load, OURS, at), found.median(load, MEMORY, at)
    stock = _least(found.median(load, STOCK, at), found.median(load, POOLED, at))
    name = f"{at:,.0f} concurrent 10-node graphs"
    yield _compare(name, "at most", 1 / 4, "the faster of stock's two", mine, stock, _ms)
    yield _compare(name, "at most", 1.5, "InMemorySaver", mine, memory, _ms)


def _sizes(found: Measures) -> Iterator[Row]:
    for operation in ("put", "get_tuple"):
        load = f"history, {operation}"
        points = found.points(load)
        short, long = (points[0], points[-1]) if points else (0, 0)
        name = f"{operation} with a history of {long:,.0f}"
        a, b = found.median(load, OURS, long), found.median(load, OURS, short)
        yield _compare(name, "at most", 1.1, f"a history of {short:,.0f}", a, b, _ms)
    load = "small channel, put"
    points = found.points(load)
    small, large = (points[0], points[-1]) if points else (0, 0)
    a, b = found.median(load, OURS, large), found.median(load, OURS, small)
    yield _compare(f"one small channel of {_bytes(large)}", "at most", 2, f"one of {_bytes(small)}", a, b, _ms)


def _memory(found: Measures) -> Iterator[Row]:
    hot, head = found.median("memory, hot", OURS), found.median("memory, head", OURS)
    allowed = None if head is None else 1.5 * head + 2 * KB
    yield _compare(
        "Redis memory per hot thread",
        "at most",
        1,
        "1.5 times the head's bytes + 2 KB",
        hot,
        allowed,
        _bytes,
    )
    left = found.median("memory, left", OURS)
    yield judge("keys of threads after flush and time to live", "at most", 0, "keys", f"{left} keys", left)
    emit = found.median("emit", OURS)
    yield judge("emit with the standard hooks", "at most", 10, "µs", f"{emit or 0:.1f} µs", emit)


def _network(found: Measures) -> Iterator[Row]:
    load = "network, put"
    added = max(found.points(load), default=0)

    def grown(key: str) -> float | None:
        far, near = found.median(load, key, added), found.median(load, key, 0)
        return None if far is None or near is None else far - near

    name = f"{added:g} ms of latency"
    yield _compare(
        f"{name}: what a put takes longer", "at most", 1.1, "what a ping does", grown(OURS), grown(PING), _ms
    )
    load = "network, graph of 10 nodes"
    mine = found.median(load, OURS, added)
    stock = _least(found.median(load, STOCK, added), found.median(load, POOLED, added))
    yield _compare(f"{name}: a 10-node graph", "at most", 0.5, "the faster of stock's two", mine, stock, _ms)


def _bytes(value: float) -> str:
    return f"{value / MB:,.0f} MB" if value >= MB else f"{value / KB:,.1f} KB"


def as_json(found: list[Row]) -> list[dict[str, Any]]:
    """Turn rows into plain data."""
    return [asdict(row) for row in found]
