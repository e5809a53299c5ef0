"""Counting what clients do wrong, in bounded memory: failed sign-ins, and refusals that are written down.

Not here: what counts as a failure (`authentication.py`).
"""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_KEYS = 10_000


class Window:
    """Counts by key within a span of time that begins with the first count.

    Keeps 10,000 keys; beyond that the one that was counted longest ago is forgotten. Used from one event loop.

    Args:
        limit: So many are allowed in each span.
        seconds: The length of the span.
        clock: Seconds that only go forward.
    """

    def __init__(self, limit: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._seconds = seconds
        self._clock = clock
        self._counts: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def full_for(self, key: str) -> float:
        """Return for how many seconds nothing more is allowed for a key; 0 if something is."""
        begun, count = self._counts.get(key, (0.0, 0))
        left = begun + self._seconds - self._clock()
        return left if count >= self._limit and left > 0 else 0.0

    def add(self, key: str) -> None:
        """Count one more."""
        now = self._clock()
        begun, count = self._counts.pop(key, (now, 0))
        self._counts[key] = (begun, count + 1) if now - begun < self._seconds else (now, 1)
        if len(self._counts) > _KEYS:
            self._counts.popitem(last=False)


def client_key(host: str | None) -> str:
    """Return what a client is counted by: its address, or the network of one household for IPv6."""
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return "unknown"
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.IPv6Network((int(address), 64), strict=False))
    return str(address)
