"""A short run of `error_store_fire.py`: each error is counted once, whatever becomes of Postgres meanwhile."""

from __future__ import annotations

import os
import random

from error_store_fire import fire


def test_errors_of_several_processes_are_counted_once_although_postgres_is_killed_and_none_deadlocks() -> None:
    seed = int(os.environ.get("FIRE_SEED", random.SystemRandom().randrange(2**32)))
    print(f"FIRE_SEED={seed}")
    result = fire(processes=4, events=1_000, restarts=1, seed=seed)
    print(result)
    assert result.is_good, f"FIRE_SEED={seed}\n{result}"
    assert result.ways["folded"] > 100, "hardly anything was folded: the test shows nothing"
    assert result.ways["redis"] > 10, "hardly anything met the outage: the test shows nothing"
    assert result.ways["spool"] > 10, "hardly anything met the outage of both: the test shows nothing"
    assert result.counts["resolved by themselves"] > 10, "hardly anything was resolved: the test shows nothing"
