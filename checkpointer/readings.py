"""The metrics whose numbers the parts of a saver keep anyway: flushed records, hooks, the buffer, the servers.

Not here: their names (`metrics.py`), how they are shown (`exposition.py`), and what is counted only for those who
measure (`instruments.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpointer.instruments import Reading
from checkpointer.metrics import (
    BACKLOG_AGE,
    BACKLOG_BYTES,
    BACKLOG_RECORDS,
    BACKLOG_THREADS,
    DEAD_LETTERS,
    DEAD_LETTERS_OPEN,
    FLUSH_BATCH,
    FLUSH_FAILURES,
    FLUSH_LAG,
    FLUSHED_BLOBS,
    FLUSHED_CHECKPOINTS,
    FLUSHED_WRITES,
    HOOK_DELIVERED,
    HOOK_DROPPED,
    HOOK_FAILURES,
    HOOK_QUEUED,
    LAST_FLUSH,
    PRESSURE,
    PUTS_AROUND,
    TIER_UP,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from checkpointer.flush.report import FlushTotals
    from checkpointer.hooks import HookStats
    from checkpointer.metrics import Metric
    from checkpointer.watch import Watcher


def of_flushers(totals: FlushTotals) -> Iterable[Reading]:
    """Read what the flushers of one process have done together."""
    yield _number(FLUSHED_CHECKPOINTS, totals.checkpoints)
    yield _number(FLUSHED_BLOBS, totals.blobs)
    yield _number(FLUSHED_WRITES, totals.writes)
    yield _number(FLUSH_FAILURES, totals.failures)
    yield _number(DEAD_LETTERS, totals.dead_letters)
    yield Reading(FLUSH_BATCH, {(): totals.batches.read()})
    yield Reading(FLUSH_LAG, {(): totals.lags.read()})
    if totals.flushed_at:
        yield _number(LAST_FLUSH, totals.flushed_at)


def of_hooks(stats: Mapping[str, HookStats]) -> Iterable[Reading]:
    """Read what became of the events that hooks were to get."""
    yield Reading(HOOK_DELIVERED, {(hook,): one.delivered for hook, one in stats.items()})
    yield Reading(HOOK_FAILURES, {(hook,): one.failed for hook, one in stats.items()})
    dropped: dict[tuple[str, ...], float] = {}
    for hook, one in stats.items():
        dropped |= {
            (hook, "full"): one.dropped_full,
            (hook, "closed"): one.dropped_closed,
            (hook, "resting"): one.skipped,
        }
    yield Reading(HOOK_DROPPED, dropped)
    yield Reading(HOOK_QUEUED, {(hook,): one.queued for hook, one in stats.items()})


def of_buffer(pressure: float, puts_around: int) -> Iterable[Reading]:
    """Read what the puts of one process have met."""
    yield _number(PUTS_AROUND, puts_around)
    yield _number(PRESSURE, pressure)


def of_servers(watcher: Watcher, down: Mapping[str, bool]) -> Iterable[Reading]:
    """Read what the last look at both servers has shown; what is not known has no sample.

    Args:
        watcher: Looks.
        down: By tier, whether a call to it has failed since the last one that was answered.
    """
    if (backlog := watcher.backlog) is not None:
        yield _number(BACKLOG_RECORDS, backlog.records)
        yield _number(BACKLOG_BYTES, backlog.held_bytes)
        yield _number(BACKLOG_THREADS, backlog.threads)
        yield _number(BACKLOG_AGE, backlog.oldest_seconds)
    if (letters := watcher.dead_letters) is not None:
        yield _number(DEAD_LETTERS_OPEN, letters)
    troubles = {"redis": watcher.redis_trouble, "postgres": watcher.postgres_trouble}
    if watcher.has_looked:
        up: dict[tuple[str, ...], float] = {
            (tier,): float(trouble is None and not down[tier]) for tier, trouble in troubles.items()
        }
        yield Reading(TIER_UP, up)


def _number(metric: Metric, value: float) -> Reading:
    return Reading(metric, {(): value})
