"""A minute of `torture.py`: whatever is killed, stopped and cut off, nothing acknowledged is lost."""

from __future__ import annotations

import os
import random

import pytest
from torture import torture


@pytest.mark.timeout(300)
def test_under_random_kills_stops_and_cuts_nothing_acknowledged_is_lost_or_repeated() -> None:
    seed = int(os.environ.get("TORTURE_SEED", random.SystemRandom().randrange(2**32)))
    print(f"TORTURE_SEED={seed}")
    result = torture(45, seed)
    print(result)
    assert result.is_good, f"TORTURE_SEED={seed}\n{result}"
    assert result.books.puts > 100, "hardly anything was acknowledged: the test shows nothing"
    assert result.faults.total() > 10, "there were hardly any faults: the test shows nothing"
