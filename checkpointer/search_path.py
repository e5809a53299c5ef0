"""A Postgres schema for a tenant: the name, checked, and the connection option that makes it the one that is used.

Not here: whether it is in effect (`checks.py`). All SQL of this package and of LangGraph names its tables without a
schema, so the schema is chosen by the connection's `search_path`, which holds nothing else: a table that is missing
there is missing, and not found in another tenant's or in `public`.
"""

from __future__ import annotations

import hashlib
import os
import re

from checkpointer.errors import ConfigurationError

_LONGEST = 63


def check_name(schema: str) -> None:
    """Refuse what cannot name a schema of one's own.

    Raises:
        ConfigurationError: It cannot.
    """
    try:
        length = len(schema.encode()) if isinstance(schema, str) else 0
    except UnicodeEncodeError:
        length = 0
    # Postgres puts the user's name for "$user" even where it is quoted.
    reserved = length and (schema == "$user" or schema.startswith("pg_") or schema == "information_schema")
    if not 0 < length <= _LONGEST or reserved or "\0" in schema:
        raise ConfigurationError(
            f"schema={schema!r}: use a name of 1 to {_LONGEST} bytes, not '$user', 'information_schema' or one that "
            "begins with 'pg_'."
        )


def with_search_path(options: str | None, schema: str) -> str:
    """Add a search path to the connection parameter `options`, after what is there, so that it wins.

    Args:
        options: What the connection string or the caller sets; None means what PGOPTIONS sets.
        schema: The schema, spelled as it is in the catalogue.
    """
    given = os.environ.get("PGOPTIONS", "") if options is None else options
    quoted = '"' + schema.replace('"', '""') + '"'
    # The server splits at white space, and takes a backslash before anything for that thing itself.
    escaped = re.sub(r"([\\\s])", r"\\\1", quoted)
    return f"{given} -c search_path={escaped}".strip()


def key_prefix(prefix: str, schema: str | None) -> str:
    """Return what Redis keys begin with: two schemas never share a buffer, even under one prefix."""
    if schema is None:
        return prefix
    # A prefix holds no colon, so this is no other one's.
    return f"{prefix}:{hashlib.sha256(schema.encode()).hexdigest()[:12]}"
