"""Is a server there? One circuit breaker for each of the two tiers, and the events when that changes.

Not here: the clients (`buffer/clients.py`, `store/clients.py`). A *tier* is the buffer (Redis) or the store (Postgres).
While a tier is down, calls are refused at once instead of costing a time-out each, except for one probe
now and then; what a refused call does instead is its caller's business. A tier of several servers has *parts*, which
are refused one by one; its outage lasts from the first part's failure to the last one's return.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from redis.exceptions import AuthenticationError, AuthorizationError, MovedError, NoPermissionError, ResponseError

from checkpointer.errors import BufferUnavailableError, StoreUnavailableError, TierUnavailableError
from checkpointer.events import CheckpointEvent, describe_error

if TYPE_CHECKING:
    from collections.abc import Callable

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 2.0


@dataclass(slots=True)
class _Outage:
    since: float
    error: BaseException
    pause: float = _FIRST_PAUSE
    probe_at: float = 0.0


class Tier:
    """The health of one tier.

    Args:
        name: `redis` or `postgres`.
        emit: Takes the `backend.down` and `backend.up` events: one pair for each outage.
    """

    def __init__(self, name: Literal["redis", "postgres"], emit: Callable[[CheckpointEvent], None]) -> None:
        self.name = name
        self._emit = emit
        self._lock = threading.Lock()
        self._down: dict[bytes | None, _Outage] = {}
        self._down_since = 0.0
        self.outages = 0

    def renew_lock(self) -> None:
        """In a forked child: whoever held the lock is not here."""
        self._lock = threading.Lock()

    @property
    def is_down(self) -> bool:
        """Whether the last call, or the last one to some part, failed."""
        return bool(self._down)

    def check(self, part: bytes | None = None, *, probes: bool = True) -> float:
        """Let a call through, or refuse it while what it needs is down.

        Args:
            part: The part that the call is for; None for the whole tier.
            probes: The call follows at once, so that it is the probe if one is due; else `check` is called again.

        Returns:
            When the call begins, for `succeeded`.

        Raises:
            TierUnavailableError: The part is down and the next probe is not due.
        """
        now = time.monotonic()
        if not self._down:
            return now
        with self._lock:
            outage = self._down.get(None) or self._down.get(part)
            if outage is None or now >= outage.probe_at:
                if outage is not None and probes:
                    outage.probe_at = now + outage.pause
                return now
            error = outage.error
        raise self.unavailable(error)

    def unavailable(self, cause: BaseException | None) -> TierUnavailableError:
        """Return the error that says that this tier cannot be reached."""
        if self.name == "redis":
            error: TierUnavailableError = BufferUnavailableError(_what_redis_says(cause))
        else:
            error = StoreUnavailableError(
                "Postgres cannot be reached. Check the server and the connection string; the saver comes back to it "
                "by itself."
            )
        error.__cause__ = cause
        return error

    def failed(self, exc: BaseException, part: bytes | None = None) -> TierUnavailableError:
        """Note a failed call; the first one of an outage becomes a `backend.down` event."""
        with self._lock:
            first = not self._down
            now = time.monotonic()
            outage = self._down.get(part)
            if outage is None:
                outage = self._down[part] = _Outage(now, exc)
            else:
                outage.error = exc
                outage.pause = min(outage.pause * 2, _LONGEST_PAUSE)
            outage.probe_at = now + outage.pause
            if first:
                self._down_since = now
                self.outages += 1
        if first:
            label = "Redis" if self.name == "redis" else "Postgres"
            rest = (
                "puts go straight to Postgres" if self.name == "redis" else "puts stay in the buffer until it is back"
            )
            self._emit(
                CheckpointEvent(
                    name="backend.down",
                    error_type=f"{self.name}_connection_error",
                    severity="error",
                    message=f"{label} cannot be reached; {rest}.",
                    component="buffer" if self.name == "redis" else "store",
                    error=describe_error(exc),
                    context={"backend": self.name},
                )
            )
        return self.unavailable(exc)

    def succeeded(self, begun: float, part: bytes | None = None) -> None:
        """Note a call that was answered; the one that ends an outage becomes a `backend.up` event.

        Args:
            begun: When the call began. One from before the outage, whose answer is noted late, proves nothing.
            part: The part that answered; an answer of any part proves that the tier as a whole is not down.
        """
        if not self._down:
            return
        with self._lock:
            for proven in {None, part}:
                outage = self._down.get(proven)
                if outage is not None and outage.since <= begun:
                    del self._down[proven]
            if self._down:
                return
            since = self._down_since
        label = "Redis" if self.name == "redis" else "Postgres"
        self._emit(
            CheckpointEvent(
                name="backend.up",
                severity="info",
                message=f"{label} is back after {time.monotonic() - since:.1f} s.",
                component="buffer" if self.name == "redis" else "store",
                outcome="recovered",
                context={"backend": self.name, "seconds": round(time.monotonic() - since, 3)},
            )
        )


def _what_redis_says(cause: BaseException | None) -> str:
    """Say what to do; a refusal in the server's words, which name a command or a right, no data."""
    if isinstance(cause, AuthenticationError | AuthorizationError) or str(cause).startswith(("WRONGPASS", "NOAUTH")):
        return f"Redis refuses the login ({cause}): check user and password in redis_url."
    if isinstance(cause, NoPermissionError):
        return f"The Redis user lacks a right ({cause}): docs/scaling.md lists those that the saver needs."
    if isinstance(cause, MovedError):
        return "Redis is a node of a cluster: use redis+cluster://host:port, or a RedisCluster client."
    if isinstance(cause, ResponseError):
        return f"Redis refuses to work ({cause}). Check the server; the saver comes back to it by itself."
    return "Redis cannot be reached. Check the server and redis_url; the saver comes back to it by itself."
