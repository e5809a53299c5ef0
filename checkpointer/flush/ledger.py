"""What this process owes: the threads it has put records of into the buffer and not yet seen in Postgres.

Not here: the records, which only Redis has. The ledger is what tells, without asking Redis, how many checkpoints
a failure concerns, when the size trigger is due, and what Postgres alone can answer while Redis is away.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field

_RECENT = 10_000


@dataclass(slots=True)
class Debt:
    """What is owed for one thread.

    Attributes:
        sequence: The highest sequence number among its records.
        records: How many records; an upper bound after a partial flush.
        checkpoints: Sequence numbers of its checkpoints.
        namespaces: Namespaces with records.
        since: When it began, on the monotonic clock.
        first_step: The lowest superstep among its checkpoints.
        run_id: The last run that put something.
    """

    sequence: int = 0
    records: int = 0
    checkpoints: list[int] = field(default_factory=list)
    namespaces: set[str] = field(default_factory=set)
    since: float = field(default_factory=time.monotonic)
    first_step: int | None = None
    run_id: str | None = None


class Ledger:
    """Debts by thread; thread-safe, and never held across I/O."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._debts: dict[str, Debt] = {}
        self._records = 0
        self._recent: OrderedDict[str, None] = OrderedDict()

    def note(
        self,
        thread_id: str,
        ns: str,
        sequence: int,
        records: int,
        *,
        is_checkpoint: bool,
        step: int | None = None,
        run_id: str | None = None,
    ) -> int:
        """Note acknowledged records; returns how many records are owed in all."""
        with self._lock:
            debt = self._debts.get(thread_id)
            if debt is None:
                debt = self._debts[thread_id] = Debt()
            debt.sequence = max(debt.sequence, sequence)
            debt.records += records
            debt.namespaces.add(ns)
            if is_checkpoint:
                debt.checkpoints.append(sequence)
                if step is not None and (debt.first_step is None or step < debt.first_step):
                    debt.first_step = step
            debt.run_id = run_id or debt.run_id
            self._records += records
            return self._records

    def paid(self, thread_id: str, upto: int) -> None:
        """Note that a thread's records up to a sequence number are in Postgres, or are gone on purpose."""
        with self._lock:
            debt = self._debts.get(thread_id)
            if debt is None:
                return
            if debt.sequence <= upto:
                self._records -= debt.records
                del self._debts[thread_id]
            else:
                debt.checkpoints = [s for s in debt.checkpoints if s > upto]

    def debt(self, thread_id: str) -> Debt | None:
        """Return what is owed for a thread."""
        return self._debts.get(thread_id)

    def begin(self, thread_id: str) -> None:
        """Note that this process works on a thread: it is about to put something."""
        with self._lock:
            self._recent[thread_id] = None
            self._recent.move_to_end(thread_id)
            if len(self._recent) > _RECENT:
                self._recent.popitem(last=False)

    def works_on(self, thread_id: str) -> bool:
        """Tell whether this process has lately put, or tried to put, something of a thread."""
        return thread_id in self._recent

    def threads(self, older_than: float = 0.0) -> list[str]:
        """Return the threads whose debt is at least this many seconds old, oldest first."""
        limit = time.monotonic() - older_than
        with self._lock:
            return [thread for thread, debt in self._debts.items() if debt.since <= limit]

    def clear(self) -> None:
        """Forget all; in a forked child."""
        self._lock = threading.Lock()
        self._debts.clear()
        self._recent.clear()
        self._records = 0

    @property
    def records(self) -> int:
        """How many records are owed."""
        return self._records
