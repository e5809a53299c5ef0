"""Bearer tokens: made, looked up, listed and revoked, as statements without I/O.

A token is `cpt_<id>_<secret>`. The *id* is public: it finds the row, and stands in lists. The *secret*, 256 random
bits, is shown once, when the token is made; the table has its SHA-256. Not here: how a request brings one
(`api/authentication.py`).
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal, get_args

from checkpointer.errors import ConfigurationError
from observability.errors.acting import note
from observability.errors.statements import Act, Row, Statement
from observability.scrub import safe_name

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["SCOPES", "NewToken", "Scope", "create", "listing", "lookup", "revoke", "split", "used", "verify"]

Scope = Literal["read", "read_sensitive", "resolve", "delete"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
"""Every scope: see errors; see their stack traces and context too; resolve, reopen and mute; delete."""

_FORM = re.compile(r"cpt_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
_COLUMNS = "id, name, scopes, created_at, created_by, expires_at, revoked_at, revoked_by, last_used_at"
# Looking says nothing about a token that does not exist: its comparison takes as long.
_NOBODY = b"\0" * 32


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token that was just made.

    Attributes:
        id: Its public part.
        token: The whole, which nobody can read again. Not part of the `repr`.
    """

    id: str
    token: str

    def __repr__(self) -> str:
        return f"NewToken(id={self.id!r})"


def create(name: str, scopes: Collection[str], *, actor: str, expires_at: datetime | None = None) -> Act[NewToken]:
    """Make a token.

    Args:
        name: Whose it is; stands in the audit of what is done with it.
        scopes: What it allows, of `SCOPES`.
        actor: Who makes it.
        expires_at: From when on it is worth nothing; None for never.

    Raises:
        ConfigurationError: The name is empty, or there is no scope or an unknown one.
    """
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown or not scopes:
        said = f"unknown scopes {', '.join(map(repr, unknown))}" if unknown else "no scope"
        raise ConfigurationError(f"The token has {said}: choose from {', '.join(SCOPES)}.")
    if not name.strip():
        raise ConfigurationError("The token has no name: say whose it is.")
    if expires_at is not None and expires_at <= datetime.now(UTC):
        raise ConfigurationError("The token would have expired already: choose a later time.")
    made = secrets.token_hex(8), secrets.token_urlsafe(32)
    ordered = [scope for scope in SCOPES if scope in scopes]
    yield Statement(
        "INSERT INTO checkpointer_api_tokens (id, name, secret_sha256, scopes, created_by, expires_at) "
        "VALUES (%(id)s, %(name)s, %(hash)s, %(scopes)s, %(actor)s, %(expires_at)s) RETURNING id",
        {
            "id": made[0],
            "name": safe_name(name, 200),
            "hash": _hash(made[1]),
            "scopes": ordered,
            "actor": safe_name(actor, 200),
            "expires_at": expires_at,
        },
    )
    # Keys without the word itself, behind which the scrubbing of secrets would blank the values.
    yield note("token_create", actor, details={"id": made[0], "name": name, "scopes": ordered})
    return NewToken(made[0], f"cpt_{made[0]}_{made[1]}")


def split(token: str) -> tuple[str, str] | None:
    """Return the id and the secret of a token, or None if it does not look like one."""
    found = _FORM.fullmatch(token)
    return None if found is None else (found[1], found[2])


def lookup(token_id: str) -> Statement[Row | None]:
    """The row of a token that is neither expired nor revoked, for `verify`."""
    return Statement(
        "SELECT id, name, scopes, secret_sha256, last_used_at FROM checkpointer_api_tokens "
        "WHERE id = %(id)s AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())",
        {"id": token_id},
        lambda rows: rows[0] if rows else None,
    )


def verify(row: Row | None, secret: str) -> bool:
    """Return whether a secret is that of the row that `lookup` has found; takes as long if there is none."""
    stored = _NOBODY if row is None else bytes(row["secret_sha256"])
    return hmac.compare_digest(_hash(secret), stored) and row is not None


def used(token_id: str) -> Statement[None]:
    """Note that a token was used, to the minute."""
    return Statement(
        "UPDATE checkpointer_api_tokens SET last_used_at = now() WHERE id = %(id)s "
        "AND (last_used_at IS NULL OR last_used_at < now() - interval '1 minute') RETURNING id",
        {"id": token_id},
        lambda rows: None,
    )


def listing() -> Statement[list[Row]]:
    """All tokens without their secrets, the newest first."""
    return Statement(f"SELECT {_COLUMNS} FROM checkpointer_api_tokens ORDER BY created_at DESC, id")


def revoke(token_id: str, *, actor: str) -> Act[Row | None]:
    """Make a token worthless from now on; again does nothing. None if there is no such token."""
    token_id = safe_name(token_id)
    changed = yield Statement(
        "UPDATE checkpointer_api_tokens SET revoked_at = now(), revoked_by = %(actor)s "
        "WHERE id = %(id)s AND revoked_at IS NULL RETURNING id, name",
        {"id": token_id, "actor": safe_name(actor, 200)},
    )
    if changed:
        yield note("token_revoke", actor, details={"id": token_id, "name": changed[0]["name"]})
    rows: list[Row] = yield Statement(
        f"SELECT {_COLUMNS} FROM checkpointer_api_tokens WHERE id = %(id)s", {"id": token_id}
    )
    return rows[0] if rows else None


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
