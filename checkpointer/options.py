"""The saver's settings: one frozen dataclass, checked when it is made.

Not here: addresses and credentials, which go to the constructor. Times are seconds, sizes bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from checkpointer import search_path
from checkpointer.errors import ConfigurationError
from checkpointer.hooks import STANDARD_HOOKS
from checkpointer.sanitize import NonFinite

if TYPE_CHECKING:
    from collections.abc import Mapping

OnUnverifiable = Literal["raise", "serve"]
Ack = Literal["buffered", "replicated", "fsynced", "flushed"]

ACKS: tuple[Ack, ...] = get_args(Ack)
"""The acknowledgement levels, from the weakest to the strongest."""
Trigger = Literal["start", "run_end", "age", "size", "close"]

ALL_TRIGGERS: frozenset[Trigger] = frozenset(get_args(Trigger))

_PREFIX = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferOptions:
    """Settings of a `BufferedPostgresSaver`.

    Attributes:
        prefix: Begins every Redis key and names the application in Postgres; 1 to 64 of `A-Z a-z 0-9 _ . -`.
        schema: The Postgres schema that all tables of this saver live in; `setup()` creates it. None: where the
            connection's own search path leads. Each schema has a buffer of its own in Redis.
        partitions: Into how many parts the threads are divided; at most 4096. Kept in Postgres for the
            prefix by `setup()`: a saver with another number is refused.
        non_finite: What becomes of NaN and Infinity in a state: `null` stores None and reports the path,
            `keep` stores them as they are, `raise` refuses the put.
        verify_reads: Ask Postgres for the thread's latest id beside each read of the buffer, so that
            checkpoints that did not go through the buffer are seen.
        on_unverifiable: What a read does if a server is away and the other is not known to be complete:
            `raise` a `TierUnavailableError`, or `serve` what is there.
        ack: When a put returns: `buffered`, Redis has it; `replicated`, so have `replicas` replicas (WAIT);
            `fsynced`, it is on the disk of Redis (WAITAOF, Redis 7.2 or Valkey); `flushed`, Postgres has committed
            it. What Redis does not confirm in time is flushed. A call chooses with
            `config["configurable"]["ack"]`.
        control_ack: The least level of control writes: errors, interrupts and resumes of tasks.
        replicas: How many replicas have to confirm at the level `replicated`.
        triggers: When the flusher works by itself. `start`: for what an earlier process left; `run_end`;
            `age`: see `flush_age`; `size`: see `flush_size`; `close`.
        flush_age: A record waits in the buffer at most about this long.
        flush_size: This many records put by this process since the last flush start one.
        batch_records: At most about this many records in one Postgres transaction.
        batch_bytes: At most about this many bytes of payload in one Postgres transaction.
        clean_ttl: How long Redis keeps the flushed head of an idle thread for fast reads.
        redis_timeout: A Redis call that takes longer counts as failed.
        postgres_timeout: How long to wait for a Postgres connection.
        query_timeout: A read of Postgres that gets no answer for so long counts as failed. What may be slow (a
            flush, a `list`, a migration) goes on as long as Postgres answers on another connection.
        pool_size: The most Postgres connections of each pool that the saver makes itself.
        close_timeout: How long `close()` tries to flush what is buffered.
        high_water_bytes: So many bytes that wait in the buffer are too many: puts slow down, and above one and a half
            times as many each one waits until Postgres has it, down to four fifths of it. A partition's mark is a
            quarter of it.
        high_water_age: The same for the age of the oldest record that waits.
        hooks: Entry-point names (group `checkpointer.hooks`) of the hooks to subscribe.
    """

    prefix: str = "checkpointer"
    schema: str | None = None
    partitions: int = 32
    non_finite: NonFinite = "null"
    verify_reads: bool = True
    on_unverifiable: OnUnverifiable = "raise"
    ack: Ack = "buffered"
    control_ack: Ack = "buffered"
    replicas: int = 1
    triggers: frozenset[Trigger] = ALL_TRIGGERS
    flush_age: float = 1.0
    flush_size: int = 10_000
    batch_records: int = 2_000
    batch_bytes: int = 16 * 1024 * 1024
    clean_ttl: float = 3_600.0
    redis_timeout: float = 2.0
    postgres_timeout: float = 3.0
    query_timeout: float = 10.0
    pool_size: int = 10
    close_timeout: float = 10.0
    high_water_bytes: int = 256 * 1024 * 1024
    high_water_age: float = 60.0
    hooks: tuple[str, ...] = STANDARD_HOOKS

    def __post_init__(self) -> None:
        if not isinstance(self.prefix, str) or not _PREFIX.fullmatch(self.prefix):
            raise ConfigurationError(
                f"prefix={self.prefix!r}: use 1 to 64 letters, digits, '_', '.' or '-' (it begins every Redis key)."
            )
        if self.schema is not None:
            search_path.check_name(self.schema)
        self._one_of("non_finite", get_args(NonFinite))
        self._one_of("on_unverifiable", get_args(OnUnverifiable))
        self._one_of("ack", ACKS)
        self._one_of("control_ack", ACKS)
        if not isinstance(self.verify_reads, bool):
            raise ConfigurationError(f"verify_reads={self.verify_reads!r}: use True or False.")
        self._between("partitions", 1, 4096, int)
        self._between("flush_size", 1, 10_000_000, int)
        self._between("batch_records", 1, 100_000, int)
        self._between("batch_bytes", 1, 1 << 30, int)
        self._between("replicas", 1, 100, int)
        self._between("high_water_bytes", 1, 1 << 50, int)
        self._between("high_water_age", 0.1, 30 * 86_400, float)
        self._between("pool_size", 1, 10_000, int)
        self._between("flush_age", 0.01, 86_400, float)
        self._between("clean_ttl", 1, 30 * 86_400, float)
        self._between("redis_timeout", 0.01, 3_600, float)
        self._between("postgres_timeout", 0.1, 3_600, float)
        self._between("query_timeout", 0.1, 86_400, float)
        self._between("close_timeout", 0, 86_400, float)
        unknown = set(self.triggers) - ALL_TRIGGERS
        if isinstance(self.triggers, str) or unknown:
            raise ConfigurationError(f"triggers={self.triggers!r}: use a set of {', '.join(sorted(ALL_TRIGGERS))}.")
        object.__setattr__(self, "triggers", frozenset(self.triggers))
        if isinstance(self.hooks, str):
            raise ConfigurationError(f"hooks={self.hooks!r}: use a tuple of entry-point names.")
        object.__setattr__(self, "hooks", tuple(self.hooks))

    @property
    def key_prefix(self) -> str:
        """What every Redis key of this saver begins with: the prefix, and a mark of the schema if there is one."""
        return search_path.key_prefix(self.prefix, self.schema)

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise ConfigurationError(f"{name}={value!r}: use one of {', '.join(map(repr, allowed))}.")

    def _between(self, name: str, low: float, high: float, kind: type) -> None:
        value = getattr(self, name)
        number = isinstance(value, int) if kind is int else isinstance(value, int | float)
        if not number or isinstance(value, bool) or not low <= value <= high:
            raise ConfigurationError(f"{name}={value!r}: use a number from {low:g} to {high:g}.")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> BufferOptions:
        """Make options from keyword arguments.

        Raises:
            ConfigurationError: A name is unknown or a value is out of range.
        """
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigurationError(f"Unknown option {name!r}: the options are {', '.join(known)}.")
        return cls(**values)
