"""What this process owes: the threads it has put records of into the buffer and not yet seen in Postgres.

Not here: the records, which only Redis has. The ledger is what tells, without asking Redis, how many checkpoints
a failure concerns, when the size trigger is due, what Postgres alone can answer while Redis is away, and that Redis
has forgotten something: it remembers the highest sequence numbers that it has seen.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

_RECENT = 10_000
_PASSED = 100_000


class Owed(NamedTuple):
    """An acknowledged checkpoint, or the pending writes of one call.

    Attributes:
        sequence: The sequence number of its last record.
        checkpoint_ns: Its namespace.
        checkpoint_id: The checkpoint.
        task_id: The task, of pending writes.
        step: The superstep of a checkpoint, if known.
    """

    sequence: int
    checkpoint_ns: str
    checkpoint_id: str
    task_id: str | None = None
    step: int | None = None


@dataclass(slots=True)
class Debt:
    """What is owed for one thread.

    Attributes:
        sequence: The highest sequence number among its records.
        records: How many records; an upper bound after a partial flush.
        owed: What they are.
        tokens: The tokens under which the thread was open when they were put.
        namespaces: Namespaces with records.
        since: When it began, on the monotonic clock.
        run_id: The last run that put something.
    """

    sequence: int = 0
    records: int = 0
    owed: list[Owed] = field(default_factory=list)
    tokens: set[int] = field(default_factory=set)
    namespaces: set[str] = field(default_factory=set)
    since: float = field(default_factory=time.monotonic)
    run_id: str | None = None

    @property
    def checkpoints(self) -> list[Owed]:
        """The checkpoints among what is owed."""
        return [owed for owed in self.owed if owed.task_id is None]

    @property
    def first_step(self) -> int | None:
        """The lowest superstep among its checkpoints."""
        return min((owed.step for owed in self.owed if owed.step is not None), default=None)


class Ledger:
    """Debts by thread; thread-safe, and never held across I/O."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._debts: dict[str, Debt] = {}
        self._records = 0
        # The last sequence number that was seen of each thread that this process works on.
        self._recent: OrderedDict[str, int] = OrderedDict()
        self._floors: dict[int, int] = {}
        # Threads of which Redis has forgotten something, until it is known what is lost.
        self._suspects: set[str] = set()
        # Threads of which something went around Redis: what Redis has of them is older.
        self._passed: OrderedDict[str, None] = OrderedDict()
        # Threads that a dead letter holds up: thread -> when to look again. What they owe is not due.
        self._pinned: dict[str, float] = {}

    def note(
        self, thread_id: str, partition: int, records: int, owed: Owed, token: int, run_id: str | None = None
    ) -> int:
        """Note acknowledged records; returns how many records are owed in all."""
        with self._lock:
            self._saw(thread_id, owed.sequence, partition, owed.sequence)
            debt = self._debts.get(thread_id)
            if debt is None:
                debt = self._debts[thread_id] = Debt()
            debt.sequence = max(debt.sequence, owed.sequence)
            debt.records += records
            debt.namespaces.add(owed.checkpoint_ns)
            debt.owed.append(owed)
            debt.tokens.add(token)
            debt.run_id = run_id or debt.run_id
            if thread_id not in self._pinned:
                self._records += records
            return self._records

    def paid(self, thread_id: str, upto: int) -> None:
        """Note that a thread's records up to a sequence number are in Postgres, or are gone on purpose."""
        with self._lock:
            debt = self._debts.get(thread_id)
            if debt is None:
                return
            if debt.sequence <= upto:
                if thread_id not in self._pinned:
                    self._records -= debt.records
                del self._debts[thread_id]
                self._suspects.discard(thread_id)
            else:
                debt.owed = [owed for owed in debt.owed if owed.sequence > upto]

    def sequences(self, threads: Iterable[str]) -> dict[str, int]:
        """Return the highest sequence number that is owed now for each of these threads that have debts."""
        with self._lock:
            return {thread: self._debts[thread].sequence for thread in threads if thread in self._debts}

    def debt(self, thread_id: str) -> Debt | None:
        """Return what is owed for a thread."""
        return self._debts.get(thread_id)

    def pin(self, thread_id: str, until: float) -> None:
        """Note that a dead letter holds a thread up; look again at that time of the monotonic clock."""
        with self._lock:
            if thread_id not in self._pinned and (debt := self._debts.get(thread_id)):
                self._records -= debt.records
            self._pinned[thread_id] = until

    def unpin(self, thread_id: str) -> None:
        """Note that nothing holds a thread up any more."""
        with self._lock:
            if self._pinned.pop(thread_id, None) is not None and (debt := self._debts.get(thread_id)):
                self._records += debt.records

    def is_pinned(self, thread_id: str) -> bool:
        """Tell whether a thread is held up, and it is not yet time to look again."""
        return self._pinned.get(thread_id, 0.0) > time.monotonic()

    def begin(self, thread_id: str) -> None:
        """Note that this process works on a thread: it is about to put something."""
        with self._lock:
            recent = self._recent
            if thread_id in recent:
                recent.move_to_end(thread_id)
                return
            recent[thread_id] = 0
            if len(recent) > _RECENT:
                recent.popitem(last=False)

    def works_on(self, thread_id: str) -> bool:
        """Tell whether this process has lately put, or tried to put, something of a thread."""
        return thread_id in self._recent

    def saw(self, thread_id: str, last: int, partition: int, sequence: int) -> None:
        """Note what Redis said: the thread's last sequence number, and its partition's."""
        with self._lock:
            self._saw(thread_id, last, partition, sequence)

    def _saw(self, thread_id: str, last: int, partition: int, sequence: int) -> None:
        if last > self._recent.get(thread_id, last):
            self._recent[thread_id] = last
        if sequence > self._floors.get(partition, 0):
            self._floors[partition] = sequence

    def suspect(self, thread_id: str) -> None:
        """Note that Redis has forgotten something of a thread; what is owed for it has to be looked for."""
        with self._lock:
            if thread_id in self._recent:
                self._recent[thread_id] = 0
            if thread_id in self._debts:
                self._suspects.add(thread_id)

    def is_suspect(self, thread_id: str) -> bool:
        """Tell whether what is owed for a thread has to be looked for."""
        return thread_id in self._suspects

    def went_around(self, thread_id: str) -> None:
        """Note that something of a thread goes around Redis, so that what Redis has of it is older."""
        with self._lock:
            self._passed[thread_id] = None
            if len(self._passed) > _PASSED:
                self._passed.popitem(last=False)

    def is_passed(self, thread_id: str) -> bool:
        """Tell whether Redis may have less of a thread than what went around it."""
        return thread_id in self._passed

    def passed(self) -> list[str]:
        """Return the threads of which Redis may have less than what went around it."""
        with self._lock:
            return list(self._passed)

    def caught_up(self, thread_ids: Iterable[str]) -> None:
        """Note that Redis has forgotten what it had of threads that was older."""
        with self._lock:
            for thread_id in thread_ids:
                self._passed.pop(thread_id, None)

    def expected(self, thread_id: str) -> int:
        """Return the last sequence number that Redis must know of a thread."""
        debt = None if thread_id in self._suspects else self._debts.get(thread_id)
        return max(self._recent.get(thread_id, 0), debt.sequence if debt else 0)

    def floor(self, partition: int) -> int:
        """Return the highest sequence number that was seen of a partition."""
        return self._floors.get(partition, 0)

    def threads(self, older_than: float = 0.0) -> list[str]:
        """Return the threads whose debt is at least this many seconds old and not held up, oldest first."""
        now = time.monotonic()
        limit = now - older_than
        with self._lock:
            return [t for t, debt in self._debts.items() if debt.since <= limit and self._pinned.get(t, 0.0) <= now]

    def clear(self) -> None:
        """Forget all; in a forked child."""
        self._lock = threading.Lock()
        self._debts.clear()
        self._recent.clear()
        self._floors.clear()
        self._suspects.clear()
        self._passed.clear()
        self._pinned.clear()
        self._records = 0

    @property
    def records(self) -> int:
        """How many records are owed, those of threads that are held up apart."""
        return self._records
