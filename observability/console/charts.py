"""Charts as SVG: where each bar stands. The words around them, and the same numbers as a table, are the templates'.

Not here: what is counted (`errors/reading.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpointer.events import SEVERITIES

if TYPE_CHECKING:
    from datetime import datetime

    from observability.errors.reading import Trends

__all__ = ["HEIGHT", "WIDTH", "Chart", "Column", "stacked"]

WIDTH, HEIGHT = 960, 100
"""The chart's own measures; the page stretches it."""

_GAP = 0.15


@dataclass(frozen=True, slots=True)
class Bar:
    """A part of a column.

    Attributes:
        kind: The severity; `other` for one that is not known.
        count: How many.
        x: Its left side.
        y: Its upper side.
        width: Its width.
        height: Its height.
    """

    kind: str
    count: int
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Column:
    """An hour or a day.

    Attributes:
        start: When it begins.
        total: How many.
        counts: How many of each kind, those that are none too.
        bars: The lowest first; of kinds that are some.
    """

    start: datetime
    total: int
    counts: dict[str, int]
    bars: list[Bar]


@dataclass(frozen=True, slots=True)
class Chart:
    """Columns, and how high the highest of them is."""

    columns: list[Column]
    kinds: list[str]
    highest: int
    total: int


def stacked(trends: Trends) -> Chart:
    """Return the columns of counts by severity, the worst at the bottom."""
    known = list(reversed(SEVERITIES))
    by_kind = {kind: [0] * len(trends.starts) for kind in [*known, "other"]}
    for series in trends.series:
        mine = by_kind[series.key if series.key in known else "other"]
        for number, count in enumerate(series.counts):
            mine[number] += count
    kinds = [kind for kind, counts in by_kind.items() if any(counts)]
    totals = [sum(counts) for counts in zip(*by_kind.values(), strict=True)]
    highest = max(totals, default=0)
    step = WIDTH / max(1, len(trends.starts))
    columns = []
    for number, start in enumerate(trends.starts):
        counts = {kind: by_kind[kind][number] for kind in kinds}
        bars, y = [], float(HEIGHT)
        for kind, count in counts.items():
            if count:
                # One error among thousands is still to be seen.
                height = max(1.5, count / highest * HEIGHT)
                y = max(0.0, y - height)
                width = step * (1 - _GAP)
                bars.append(Bar(kind, count, round(number * step, 2), round(y, 2), round(width, 2), round(height, 2)))
        columns.append(Column(start, totals[number], counts, bars))
    return Chart(columns, kinds, highest, sum(totals))
