"""What was measured: values by load, contender and point, and the median and 99th percentile of each.

Not here: measuring (`loads/`) and what the numbers mean (`targets.py`).
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


@dataclass(frozen=True, slots=True)
class Measure:
    """What one contender showed at one point of one load.

    Attributes:
        load: What was done.
        contender: By whom (its key).
        at: The point: bytes of state, concurrent threads, length of a history, milliseconds of latency; else 0.
        unit: Of the median and the 99th percentile.
        median: The median.
        p99: The 99th percentile: with fewer than 100 values the largest.
        count: How many values there are.
    """

    load: str
    contender: str
    at: float
    unit: str
    median: float
    p99: float
    count: int


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that is not exceeded by this share of them (the nearest rank)."""
    if not values:
        raise ValueError("there is no percentile of nothing")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


class Measures:
    """Measures by load, contender and point."""

    def __init__(self, measures: Iterable[Measure]) -> None:
        self._by_key = {(found.load, found.contender, found.at): found for found in measures}

    def find(self, load: str, contender: str, at: float = 0) -> Measure | None:
        """Return one measure, or None if it was not taken."""
        return self._by_key.get((load, contender, at))

    def median(self, load: str, contender: str, at: float = 0) -> float | None:
        """Return the median of one measure, or None if it was not taken."""
        found = self.find(load, contender, at)
        return found.median if found else None

    def points(self, load: str) -> list[float]:
        """Return the points at which a load was measured, ascending."""
        return sorted({at for name, _, at in self._by_key if name == load})

    def contenders(self, load: str) -> list[str]:
        """Return who was measured at a load, in the order in which it was noted first."""
        return list(dict.fromkeys(contender for name, contender, _ in self._by_key if name == load))

    def __iter__(self) -> Any:
        return iter(self._by_key.values())


class Results:
    """Takes values while loads run.

    Attributes:
        notes: What a reader has to know beside the numbers: who was left out of which load, and why.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[str, str, float], list[float]] = defaultdict(list)
        self._units: dict[str, str] = {}
        self.notes: list[str] = []
        self._is_warm_up = False

    @contextlib.contextmanager
    def warm_up(self) -> Iterator[None]:
        """Take no values during the block."""
        self._is_warm_up = True
        try:
            yield
        finally:
            self._is_warm_up = False

    def note(self, load: str, contender: str, value: float, *, at: float = 0, unit: str = "ms") -> None:
        """Take one value."""
        if self._is_warm_up:
            return
        self._values[load, contender, at].append(value)
        if self._units.setdefault(load, unit) != unit:
            raise ValueError(f"{load} is measured in {self._units[load]}, not in {unit}")

    def remark(self, text: str) -> None:
        """Take a remark, once."""
        if text not in self.notes:
            self.notes.append(text)

    def measures(self) -> list[Measure]:
        """Return what there is so far."""
        return [
            Measure(load, who, at, self._units[load], statistics.median(values), percentile(values, 0.99), len(values))
            for (load, who, at), values in self._values.items()
        ]


def as_json(measures: Iterable[Measure]) -> list[dict[str, Any]]:
    """Turn measures into what `from_json` takes."""
    return [asdict(measure) for measure in measures]


def from_json(found: Iterable[dict[str, Any]]) -> list[Measure]:
    """Turn what `as_json` has given into measures."""
    return [Measure(**fields) for fields in found]
