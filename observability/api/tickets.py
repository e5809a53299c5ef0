"""Tickets for streams: a browser's EventSource cannot send a header, so it brings a ticket in the URL.

A *ticket* is good for one stream (its *purpose*), for 60 seconds, and is signed, so that any process with the same
key can check it. A URL can end up in logs: by then it is worth nothing. Not here: who gets one.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = 60
"""How long a ticket is good for."""

_LONGEST = 4_000


class Tickets:
    """Gives out tickets and checks them.

    Args:
        key: Signs them; processes that serve the same clients need the same one. By default a random one, for a
            process alone.
        clock: Seconds since 1970.
    """

    def __init__(self, key: bytes | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self._key = key or secrets.token_bytes(32)
        self._clock = clock

    def issue(self, purpose: str) -> str:
        """Return a ticket for one purpose."""
        values = [purpose, int(self._clock()) + SECONDS, secrets.token_hex(8)]
        payload = base64.urlsafe_b64encode(json.dumps(values).encode()).rstrip(b"=").decode()
        return f"{payload}.{self._sign(payload)}"

    def is_good(self, ticket: str, purpose: str) -> bool:
        """Return whether a ticket was given out for this purpose and has not expired."""
        payload, _, signature = ticket.partition(".")
        if len(ticket) > _LONGEST or not ticket.isascii():
            return False
        if not hmac.compare_digest(signature, self._sign(payload)):
            return False
        values = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return bool(values[0] == purpose and self._clock() < values[1])

    def _sign(self, payload: str) -> str:
        digest = hmac.digest(self._key, b"checkpointer-ticket:" + payload.encode(), hashlib.sha256)
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
