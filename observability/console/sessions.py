"""Who has signed in: a signed cookie that names a token, never the token itself.

The cookie says *whose* token it was and is worth nothing without it: each request asks whether the token is still
good. A *form token* belongs to one session; a page of another site cannot know it. Not here: what a token is worth
(`api/authentication.py`).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["SECONDS", "Session", "Sessions"]

SECONDS = 12 * 3_600
"""How long one stays signed in."""

_LONGEST = 2_000
_ENDED = 10_000


@dataclass(frozen=True, slots=True)
class Session:
    """Somebody who has signed in.

    Attributes:
        credential: Names the token.
        seal: Of the token, see `BearerTokens.seal`.
        form_token: Has to come with every form.
        nonce: Tells sessions apart.
        ends_at: Seconds since 1970.
    """

    credential: str
    seal: str
    form_token: str
    nonce: str
    ends_at: float


class Sessions:
    """Begins, reads and ends sessions; used from one event loop.

    Args:
        key: Signs the cookies; processes that serve the same clients need the same one. By default a random one,
            for a process alone: everybody signs in again when it is restarted.
        clock: Seconds since 1970.
    """

    def __init__(self, key: bytes | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self._key = key or secrets.token_bytes(32)
        self._clock = clock
        self._ended: dict[str, float] = {}

    def begin(self, credential: str, seal: str) -> str:
        """Return the cookie of a new session."""
        values = [credential, seal, secrets.token_hex(16), int(self._clock()) + SECONDS]
        payload = base64.urlsafe_b64encode(json.dumps(values).encode()).rstrip(b"=").decode()
        return f"{payload}.{self._sign('session', payload)}"

    def read(self, cookie: str | None) -> Session | None:
        """Return the session of a cookie; None if it is not one, has ended, or is too old."""
        if not cookie or len(cookie) > _LONGEST or not cookie.isascii():
            return None
        payload, _, signature = cookie.partition(".")
        if not hmac.compare_digest(signature, self._sign("session", payload)):
            return None
        try:
            padded = payload + "=" * (-len(payload) % 4)
            credential, seal, nonce, ends_at = json.loads(base64.urlsafe_b64decode(padded))
        except (ValueError, binascii.Error):
            return None
        if self._clock() >= ends_at or nonce in self._ended:
            return None
        return Session(credential, seal, self._sign("form", nonce), nonce, ends_at)

    def end(self, session: Session) -> None:
        """Make a session worthless in this process before its time; again does nothing."""
        now = self._clock()
        self._ended = {nonce: ends_at for nonce, ends_at in self._ended.items() if ends_at > now}
        if len(self._ended) < _ENDED:
            self._ended[session.nonce] = session.ends_at

    def _sign(self, purpose: str, text: str) -> str:
        digest = hmac.digest(self._key, f"checkpointer-{purpose}:{text}".encode(), hashlib.sha256)
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
