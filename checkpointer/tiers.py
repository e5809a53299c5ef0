"""Is a server there? One circuit breaker for each of the two tiers, and the events when that changes.

Not here: the clients (`buffer/clients.py`, `store/clients.py`). A *tier* is the buffer (Redis) or the store (Postgres).
While a tier is down, calls are refused at once instead of costing a time-out each, except for one probe
now and then; what a refused call does instead is its caller's business.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Literal

from checkpointer.errors import BufferUnavailableError, StoreUnavailableError, TierUnavailableError
from checkpointer.events import CheckpointEvent, describe_error

if TYPE_CHECKING:
    from collections.abc import Callable

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 2.0


class Tier:
    """The health of one server.

    Args:
        name: `redis` or `postgres`.
        emit: Takes the `backend.down` and `backend.up` events: one pair for each outage.
    """

    def __init__(self, name: Literal["redis", "postgres"], emit: Callable[[CheckpointEvent], None]) -> None:
        self.name = name
        self._emit = emit
        self._lock = threading.Lock()
        self._down_since: float | None = None
        self._probe_at = 0.0
        self._pause = _FIRST_PAUSE
        self._error: BaseException | None = None
        self.outages = 0

    @property
    def is_down(self) -> bool:
        """Whether the last call failed."""
        return self._down_since is not None

    def check(self) -> float:
        """Let a call through, or refuse it while the tier is down.

        Returns:
            When the call begins, for `succeeded`.

        Raises:
            TierUnavailableError: The tier is down and the next probe is not due.
        """
        now = time.monotonic()
        if self._down_since is None:
            return now
        with self._lock:
            if self._down_since is None or now >= self._probe_at:
                self._probe_at = now + self._pause
                return now
            error = self._error
        raise self.unavailable(error)

    def unavailable(self, cause: BaseException | None) -> TierUnavailableError:
        """Return the error that says that this tier cannot be reached."""
        if self.name == "redis":
            error: TierUnavailableError = BufferUnavailableError(
                "Redis cannot be reached or refuses to work. Check the server and redis_url; the saver comes back "
                "to it by itself."
            )
        else:
            error = StoreUnavailableError(
                "Postgres cannot be reached. Check the server and the connection string; the saver comes back to it "
                "by itself."
            )
        error.__cause__ = cause
        return error

    def failed(self, exc: BaseException) -> TierUnavailableError:
        """Note a failed call; the first one of an outage becomes a `backend.down` event."""
        with self._lock:
            first = self._down_since is None
            now = time.monotonic()
            if first:
                self._down_since = now
                self.outages += 1
                self._pause = _FIRST_PAUSE
            else:
                self._pause = min(self._pause * 2, _LONGEST_PAUSE)
            self._probe_at = now + self._pause
            self._error = exc
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

    def succeeded(self, begun: float) -> None:
        """Note a call that was answered; the first one after an outage becomes a `backend.up` event.

        Args:
            begun: When the call began. One from before the outage, whose answer is noted late, proves nothing.
        """
        if self._down_since is None:
            return
        with self._lock:
            since = self._down_since
            if since is None or begun < since:
                return
            self._down_since = self._error = None
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
