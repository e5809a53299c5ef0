"""What a run found, as JSON, as Markdown and on the console.

Not here: pictures (`plots.py`). The Markdown has the targets first, then a table for each load: contenders in rows, the
points at which they were measured in columns.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table

from benchmarks import measure, targets
from benchmarks.contenders import MEMORY, OURS, STOCK, name_of
from benchmarks.scale import KB, MB

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from rich.console import Console

    from benchmarks.measure import Measure, Measures
    from benchmarks.targets import Row

_NOTHING = "–"  # noqa: RUF001
_TIMES = "×"  # noqa: RUF001


class Section(NamedTuple):
    """One table: its title, the loads in it, how a point is called, and what ratios are relative to."""

    title: str
    loads: tuple[str, ...]
    point: Callable[[float], str]
    base: str | None = STOCK


def size_text(value: float) -> str:
    """Write a number of bytes."""
    return f"{value / MB:g} MB" if value >= MB else f"{value / KB:g} KB"


def _count(what: str) -> Callable[[float], str]:
    return lambda value: f"{value:,.0f} {what if value != 1 else what[:-1]}"


def _added(value: float) -> str:
    return f"+{value:g} ms"


def _none(_: float) -> str:
    return ""


SECTIONS = (
    Section("put, synchronous, by size of the state", ("put",), size_text),
    Section("put_writes, synchronous, by size of the state", ("put_writes",), size_text),
    Section("get_tuple, synchronous, hot thread, by size of the state", ("get_tuple",), size_text),
    Section("get_tuple, synchronous, cold thread, by size of the state", ("get_tuple, cold",), size_text),
    Section("Asynchronous operations, one at a time", ("aput", "aput_writes", "aget_tuple"), _none),
    Section("Burst, by concurrent threads (put and put_writes, states made before)", ("burst",), _count("threads")),
    Section("Burst, the caller making each state", ("burst, made",), _count("threads")),
    Section("Sustained, 50 concurrent threads, backlog not growing", ("sustained",), _none),
    Section(
        "Checkpoints that waited to be flushed",
        ("sustained, waiting at the begin", "sustained, waiting at the end"),
        _none,
        None,
    ),
    Section("Graphs, time until all runs have ended", ("graph, 10 nodes",), _count("runs")),
    Section("Graphs: fan-out of 20 tasks", ("graph, fan-out",), _count("runs")),
    Section("Graphs: 10 nodes over 100 channels of 1 KB", ("graph, wide state",), _count("runs")),
    Section("Graphs: agent with five tool calls", ("graph, tool agent",), _count("runs")),
    Section("Resume: open, read, one step", ("resume",), _none),
    Section("Flush of a backlog", ("flush",), _none),
    Section("put beside the flusher", ("put, no flusher", "put, idle flusher", "put, busy flusher"), _none, None),
    Section("put by length of the history", ("history, put",), _count("checkpoints")),
    Section("Hot get_tuple by length of the history", ("history, get_tuple",), _count("checkpoints")),
    Section("list(limit=10) by length of the history", ("history, list",), _count("checkpoints")),
    Section("put of one small channel, by size of the rest of the state", ("small channel, put",), size_text),
    Section("put by added network latency", ("network, put",), _added),
    Section("A run of a 10-node graph by added network latency", ("network, graph of 10 nodes",), _added),
    Section(
        "Round trips",
        tuple(
            f"round trips to {server}, {name}"
            for name in ("put", "put_writes", "get_tuple")
            for server in ("Redis", "Postgres")
        ),
        _none,
        None,
    ),
    Section("Redis memory", ("memory, dirty", "memory, hot", "memory, head", "memory, left"), _none, None),
    Section("emit of an event", ("emit",), _none, None),
)


def write(folder: Path, facts: dict[str, Any], measures: Sequence[Measure], notes: Sequence[str]) -> list[Row]:
    """Write `results.json` and `results.md`; returns the targets' rows."""
    rows = targets.rows(measure.Measures(measures))
    found = {
        "facts": facts,
        "targets": targets.as_json(rows),
        "measures": measure.as_json(measures),
        "notes": list(notes),
    }
    (folder / "results.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    (folder / "results.md").write_text(markdown(facts, rows, measure.Measures(measures), notes))
    return rows


def read(path: Path) -> tuple[dict[str, Any], list[Measure], list[str]]:
    """Read what `write` has written as JSON."""
    found = json.loads(path.read_text())
    return found["facts"], measure.from_json(found["measures"]), found["notes"]


def markdown(facts: dict[str, Any], rows: Sequence[Row], measures: Measures, notes: Sequence[str]) -> str:
    """Return the whole report."""
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    lines += [
        "",
        "## Targets",
        "",
        *_table(["target", "measured", "ratio", "wanted", ""], [_cells(row) for row in rows]),
    ]
    for section in SECTIONS:
        if table := _section(section, measures):
            lines += ["", f"### {section.title}", "", *table]
    if notes:
        lines += ["", "## Left out", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[str]:
    ratio = _NOTHING if row.ratio is None else f"{row.ratio:.2f}"
    sign = "≤" if row.wanted == "at most" else "≥"
    return [row.name, row.measured, ratio, f"{sign} {row.limit:g} {row.of}", "met" if row.met else "**missed**"]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _section(section: Section, measures: Measures) -> list[str]:
    columns = [(load, at) for load in section.loads for at in measures.points(load)]
    if not columns:
        return []
    units = {load: next(m.unit for m in measures if m.load == load) for load, _ in columns}
    if len(section.loads) == 1:
        head = [f"{units[load]}: {section.point(at)}".rstrip(": ") for load, at in columns]
    else:
        head = [f"{load}, {units[load]}" for load, _ in columns]
    keys = dict.fromkeys(key for load in section.loads for key in measures.contenders(load))
    rows = []
    for key in sorted(keys, key=lambda key: (key == MEMORY, not key.startswith(OURS))):
        cells = [_cell(measures, load, key, at, section.base) for load, at in columns]
        rows.append([name_of(key), *cells])
    return _table(["median / p99 (median relative to stock)" if section.base else "median / p99", *head], rows)


def _cell(measures: Measures, load: str, key: str, at: float, base: str | None) -> str:
    found = measures.find(load, key, at)
    if found is None:
        return _NOTHING
    is_spread = found.count > 1 and not found.unit.endswith("/s")  # the 99th percentile of a rate is its best case
    text = f"{number(found.median)} / {number(found.p99)}" if is_spread else number(found.median)
    relative = targets.ratio_of(found.median, measures.median(load, base, at)) if base else None
    return text if relative is None else f"{text} ({relative:.2f}{_TIMES})"


def number(value: float) -> str:
    """Write a number with about three digits."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def show(console: Console, rows: Sequence[Row]) -> None:
    """Print the targets."""
    table = Table("target", "measured", "ratio", "wanted", "")
    for row in rows:
        *cells, verdict = _cells(row)
        table.add_row(*cells, verdict.strip("*"), style=None if row.met else "red")
    console.print(table)
