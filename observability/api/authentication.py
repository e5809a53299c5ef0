"""Bearer tokens as credentials: a dependency that returns a principal, or refuses with 401 or 429.

Not here: how tokens are made and kept (`observability/tokens.py`), and what a principal may do (`admin.py`).
"""

# No `from __future__ import annotations`: FastAPI reads them.

import hashlib
import hmac
import math
from typing import Annotated

from fastapi import Depends, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from observability import tokens
from observability.api.limits import Window, client_key
from observability.api.principals import SCOPES, Principal
from observability.api.store import Store

_CLIENT_FAILURES, _TOKEN_FAILURES, _SECONDS = 10, 20, 60.0
_LONGEST_TOKEN = 1_000

_scheme = HTTPBearer(auto_error=False, scheme_name="bearerToken", description="A token made by `checkpointer tokens`.")


class BearerTokens:
    """Finds the principal of a request by its bearer token; use it as `authorize=`.

    After 10 failures of a client's address or 20 with a token's id within a minute, what comes from there or with
    this id is refused unseen with 429 until the minute is over.

    Args:
        store: Has the tokens.
        admin_token: One more token, which has every scope; its principal is `admin-token`. None or empty for none.
    """

    def __init__(self, store: Store, *, admin_token: str | None = None) -> None:
        self._store = store
        self._admin = hashlib.sha256(admin_token.encode()).digest() if admin_token else None
        self._by_client = Window(_CLIENT_FAILURES, _SECONDS)
        self._by_token = Window(_TOKEN_FAILURES, _SECONDS)

    async def __call__(
        self, request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Depends(_scheme)] = None
    ) -> Principal:
        """Return the principal.

        Raises:
            HTTPException: 401 without valid credentials, 429 after too many failures.
            StoreUnavailableError: The token cannot be looked up.
        """
        return await self.check(_token_of(request), client_key(request.client.host if request.client else None))

    async def check(self, token: str | None, client: str) -> Principal:
        """Return the principal of a token, wherever it came from; failures count all the same.

        Args:
            token: As it was given; None if it was not.
            client: What the client is counted by (`limits.client_key`).

        Raises:
            HTTPException: 401 for one that is not valid, 429 after too many failures.
            StoreUnavailableError: The token cannot be looked up.
        """
        _refuse_if(self._by_client.full_for(client))
        if token is None:
            # Counted too: whoever asks without credentials makes work for the audit.
            self._by_client.add(client)
            raise _unauthorized("No bearer token was given.")
        given = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
        if self._admin is not None and hmac.compare_digest(given, self._admin):
            return Principal("admin-token", frozenset(SCOPES), "admin-token")
        parts = tokens.split(token) if len(token) <= _LONGEST_TOKEN else None
        if parts is not None:
            _refuse_if(self._by_token.full_for(parts[0]))
            row = await self._store.run(tokens.lookup(parts[0]))
            if tokens.verify(row, parts[1]) and row is not None:
                await self._store.run(tokens.used(parts[0]))
                return Principal(row["name"], frozenset(row["scopes"]), f"token {parts[0]}")
            self._by_token.add(parts[0])
        self._by_client.add(client)
        raise _unauthorized("The bearer token is not valid.", ', error="invalid_token"')

    async def recall(self, credential: str, seal: str) -> Principal | None:
        """Return the principal of a token that was checked before; None if it is worth nothing any more.

        Args:
            credential: The principal's `credential`.
            seal: What `seal` returned for it then.

        Raises:
            StoreUnavailableError: The token cannot be looked up.
        """
        if not hmac.compare_digest(seal.encode(), self.seal(credential).encode()):
            return None
        if credential == "admin-token":
            return None if self._admin is None else Principal(credential, frozenset(SCOPES), credential)
        token_id = credential.removeprefix("token ")
        row = await self._store.run(tokens.lookup(token_id))
        return None if row is None else Principal(row["name"], frozenset(row["scopes"]), credential)

    def seal(self, credential: str) -> str:
        """Return what changes with the token behind a credential, for those that can change in place."""
        if credential != "admin-token" or self._admin is None:
            return ""
        return hashlib.sha256(b"checkpointer-session:" + self._admin).hexdigest()[:32]


def _token_of(request: Request) -> str | None:
    """Return the token; None if there is none, or more than one header that could hold it."""
    headers = request.headers.getlist("authorization")
    if len(headers) != 1:
        return None
    scheme, _, token = headers[0].partition(" ")
    token = token.strip()
    return token if scheme.lower() == "bearer" and 0 < len(token) <= _LONGEST_TOKEN else None


def _refuse_if(seconds: float) -> None:
    if seconds:
        raise HTTPException(
            429, "Too many failed attempts: wait.", headers={"Retry-After": str(max(1, math.ceil(seconds)))}
        )


def _unauthorized(detail: str, more: str = "") -> HTTPException:
    return HTTPException(401, detail, headers={"WWW-Authenticate": f'Bearer realm="checkpointer"{more}'})
