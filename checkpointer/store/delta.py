"""The history of delta channels, read from Postgres, without I/O.

Not here: flushing the thread first (`operations.py`). A *delta channel* stores a snapshot of its value only now
and then; between snapshots its value is the writes along the parent chain. The *seed* is the nearest stored value. The
walk is LangGraph's own, whose helpers are used; here it is a generator that yields queries and receives rows, so
that it serves both kinds of callers and `prune`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from langgraph.checkpoint.postgres.base import (
    _DELTA_PAGE_SIZE,
    BasePostgresSaver,
    _build_delta_stage1_sql,
    _build_delta_stage2_sql,
)

from checkpointer.store.reads import Query

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from checkpointer.records import Address

Rows = list[dict[str, Any]]


@dataclass(slots=True)
class Walk:
    """What the walk up the parent chain found.

    Attributes:
        chain: By channel, the ancestors visited, nearest first, the one with the seed last.
        seed_version: By channel, the version of the seed's blob, if a seed was found.
        seed_inline: By channel, the seed itself where it stands in the checkpoint.
    """

    chain: dict[str, list[str]]
    seed_version: dict[str, str | None]
    seed_inline: dict[str, Any] = field(default_factory=dict)


def walk(address: Address, checkpoint_id: str, channels: Sequence[str]) -> Generator[Query, Rows, Walk]:
    """Walk from a checkpoint up to each channel's seed."""
    found = Walk({ch: [] for ch in channels}, dict.fromkeys(channels))
    parent_of: dict[str, str | None] = {}
    versions: list[dict[str, str | None]] = [{} for _ in channels]
    has_blob: list[dict[str, bool]] = [{} for _ in channels]
    inline: list[dict[str, Any]] = [{} for _ in channels]
    cursors: dict[str, str | None] = {}
    seeded: set[str] = set()
    at: str | None = checkpoint_id
    sql = _build_delta_stage1_sql(channels, paged=True, include_cursor=True)
    names = [name for ch in channels for name in (ch, ch, ch, ch)]
    while True:
        page = yield Query(sql, [*names, address.thread_id, address.checkpoint_ns, at, _DELTA_PAGE_SIZE])
        if not page:
            return found
        at = BasePostgresSaver._ingest_stage1_page(page, channels, parent_of, versions, has_blob, inline)
        BasePostgresSaver._try_advance_walks(
            checkpoint_id,
            channels,
            parent_of,
            versions,
            has_blob,
            inline,
            found.chain,
            found.seed_version,
            found.seed_inline,
            cursors,
            seeded,
        )
        if len(seeded) == len(channels) or len(page) < _DELTA_PAGE_SIZE:
            return found
        sql = _build_delta_stage1_sql(channels, paged=True)


def contents(address: Address, channels: Sequence[str], found: Walk) -> Generator[Query, Rows, Rows]:
    """Read the writes along the chains and the seeds' blobs."""
    with_chain = [ch for ch in channels if found.chain[ch]]
    with_seed = [ch for ch in channels if found.seed_version[ch] is not None]
    sql = _build_delta_stage2_sql(channels_with_chain=with_chain, channels_with_seed=with_seed)
    if not sql:
        return []
    where = (address.thread_id, address.checkpoint_ns)
    params: list[Any] = []
    for ch in with_chain:
        params += (*where, ch, found.chain[ch])
    for ch in with_seed:
        params += (*where, ch, found.seed_version[ch])
    return (yield Query(sql, params))
