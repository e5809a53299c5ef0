"""What the servers say about themselves, judged: is this Redis and this Postgres fit to keep the guarantees?

Not here: asking them (`operations.py` does when a saver starts, `doctor.py` when somebody wants to know). Every
function is a plain one over what was answered, and takes "it does not say" for an answer: hosted servers hide `CONFIG`,
and an access list can deny even `INFO`.

A *finding* is one judgement. An *error* says that the server must not be used as it is, a *warning* that a promise is
weaker than it could be; *ok* is there to be read by people. A *passing* error can go away by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

from checkpointer.errors import CheckpointerError, ConfigurationError, UnsupportedServerError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

Level = Literal["ok", "warning", "error"]

LEVELS: tuple[Level, ...] = ("ok", "warning", "error")
"""Levels in ascending order of rank."""

PASSING = frozenset({"redis.loading", "redis.replica", "redis.aof_write", "postgres.read_only", "clock.skew"})
"""Codes of errors that may pass by themselves: `setup()` refuses them, a saver in use reports them and goes on."""

_CONFIGURATION = frozenset({"redis.cluster", "postgres.schema", "postgres.partitions"})

_MIN_REDIS = 7
_MIN_POSTGRES = 15_00_00
_NEARLY_FULL = 0.9
_SKEW_WARNING = 1.0
_SKEW_ERROR = 60.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One judgement.

    Attributes:
        level: `ok`, `warning` or `error`.
        code: What was judged, dotted, stable: `redis.eviction`, `clock.skew`, ...
        message: What was found, without credentials.
        advice: What to do about it; empty if nothing is to be done.
    """

    level: Level
    code: str
    message: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.message} {self.advice}".rstrip()


@dataclass(frozen=True, slots=True)
class BufferFacts:
    """What Redis said.

    Attributes:
        nodes: `INFO` of each node that was asked; empty if it was denied.
        cluster_client: Whether it was asked by a client that speaks to a cluster.
        config: `CONFIG GET` by name; None if it was denied or not asked for.
    """

    nodes: Sequence[Mapping[str, Any]]
    cluster_client: bool = False
    config: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """A clock, read from here: the server's time, and this machine's before the question and after the answer."""

    name: str
    server: float
    asked: float
    answered: float

    @property
    def ahead(self) -> tuple[float, float]:
        """The least and the most seconds by which the server's clock can be ahead of this machine's."""
        return self.server - self.answered, self.server - self.asked


@dataclass(slots=True)
class Clocks:
    """The readings of one check.

    Attributes:
        readings: One for each server that told its time.
    """

    readings: list[Reading] = field(default_factory=list)

    def note(self, name: str, server: Any, asked: float, answered: float) -> None:
        """Add a reading; None for the server's time adds nothing."""
        if server is not None:
            self.readings.append(Reading(name, float(server), asked, answered))


def worst(findings: Sequence[Finding]) -> Level:
    """Return the highest level; `ok` if there is nothing."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")


def as_error(finding: Finding) -> CheckpointerError:
    """Return the exception that says what a finding says."""
    kind = ConfigurationError if finding.code in _CONFIGURATION else UnsupportedServerError
    return kind(str(finding))


# -- Redis -----------------------------------------------------------------------------------------------------------


def redis_findings(facts: BufferFacts) -> list[Finding]:
    """Judge a Redis; of a cluster, each kind of trouble is told once."""
    if not facts.nodes:
        return [
            Finding(
                "warning",
                "redis.unchecked",
                "Redis does not let this user run INFO, so its version, persistence and eviction could not be checked.",
                "Allow it (ACL SETUSER ... +info), or check by hand: Redis 7.0 or newer, maxmemory-policy noeviction, "
                "appendonly yes.",
            )
        ]
    found: dict[str, Finding] = {}
    for node in facts.nodes:
        for finding in _judge_node(node, facts):
            known = found.get(finding.code)
            if known is None or LEVELS.index(finding.level) > LEVELS.index(known.level):
                found[finding.code] = finding
    return list(found.values())


def _judge_node(info: Mapping[str, Any], facts: BufferFacts) -> list[Finding]:
    found = [_redis_version(info), _eviction(info), *_persistence(info, facts.config), *_room(info)]
    if info.get("loading"):
        found.append(
            Finding(
                "error",
                "redis.loading",
                "Redis is still loading its data and refuses commands.",
                "Wait until it has started.",
            )
        )
    if info.get("role") == "slave":
        found.append(
            Finding(
                "error",
                "redis.replica",
                "This Redis is a replica, which takes no writes.",
                "Give the address of the primary (or of its sentinels).",
            )
        )
    if info.get("cluster_enabled") and not facts.cluster_client:
        found.append(
            Finding(
                "error",
                "redis.cluster",
                "This Redis is a node of a cluster, and the client is not one for clusters.",
                "Use redis+cluster://host:port, or give a redis.RedisCluster.",
            )
        )
    return found


def _redis_version(info: Mapping[str, Any]) -> Finding:
    version = str(info.get("valkey_version") or info.get("redis_version", "0"))
    name = "Valkey" if info.get("valkey_version") else "Redis"
    major = str(info.get("redis_version", version)).split(".")[0]
    if not major.isdigit() or int(major) < _MIN_REDIS:
        return Finding("error", "redis.version", f"{name} {version} is too old:", "use Redis 7.0 or newer, or Valkey.")
    return Finding("ok", "redis.version", f"{name} {version}.")


def _eviction(info: Mapping[str, Any]) -> Finding:
    policy = info.get("maxmemory_policy")
    if not policy:
        return Finding(
            "warning",
            "redis.eviction",
            "Redis does not tell its maxmemory-policy.",
            "Make sure that it is noeviction: an allkeys policy can drop checkpoints that are not flushed yet.",
        )
    if str(policy).startswith("allkeys"):
        return Finding(
            "error",
            "redis.eviction",
            f"maxmemory-policy is {policy}: when its memory is full, Redis drops checkpoints that are not flushed yet.",
            "Set maxmemory-policy to noeviction (or a volatile one): CONFIG SET maxmemory-policy noeviction, and in "
            "the server's configuration.",
        )
    if policy == "noeviction":
        return Finding("ok", "redis.eviction", "maxmemory-policy is noeviction: nothing is dropped.")
    return Finding(
        "ok",
        "redis.eviction",
        f"maxmemory-policy is {policy}: only keys with a time to live can be dropped, and of the saver's keys only the "
        "read cache has one.",
    )


def _persistence(info: Mapping[str, Any], config: Mapping[str, str] | None) -> list[Finding]:
    found: list[Finding] = []
    if "aof_enabled" not in info:
        found.append(
            Finding(
                "warning",
                "redis.persistence",
                "Redis does not tell whether it keeps an append-only file.",
                "Make sure that it does (appendonly yes), or that its provider replicates it.",
            )
        )
    elif info["aof_enabled"]:
        found.append(_append_only(config))
    else:
        found.append(_no_append_only(info, config))
    if info.get("aof_enabled") and info.get("aof_last_write_status", "ok") != "ok":
        found.append(
            Finding(
                "error",
                "redis.aof_write",
                "Redis could not write its append-only file, and refuses writes meanwhile.",
                "Look at its log and at its disk: it is probably full.",
            )
        )
    if info.get("rdb_last_bgsave_status", "ok") != "ok":
        found.append(
            Finding(
                "warning",
                "redis.snapshot_failed",
                "The last snapshot of Redis failed; with stop-writes-on-bgsave-error it refuses writes.",
                "Look at its log: the disk is full, or there is too little memory to fork (vm.overcommit_memory=1).",
            )
        )
    return found


def _append_only(config: Mapping[str, str] | None) -> Finding:
    fsync = (config or {}).get("appendfsync")
    if fsync == "no":
        return Finding(
            "warning",
            "redis.persistence",
            "Redis keeps an append-only file and leaves to the system when it reaches the disk (appendfsync no): a "
            "crash of the machine can cost some 30 seconds of what is not flushed.",
            "Set appendfsync to everysec or always.",
        )
    lost = {
        "always": "what was acknowledged survives a crash of the machine",
        "everysec": "a crash of the process costs nothing, one of the machine at most about a second of what is not "
        "flushed",
    }.get(fsync or "", "what is not flushed survives a crash of the process")
    return Finding("ok", "redis.persistence", f"Redis keeps an append-only file: {lost}.")


def _no_append_only(info: Mapping[str, Any], config: Mapping[str, str] | None) -> Finding:
    schedule = None if config is None else config.get("save")
    changes = info.get("rdb_changes_since_last_save")
    since = f" (now: {changes} changes since the last one)" if changes is not None else ""
    if schedule == "":
        message = (
            "Redis keeps nothing on disk (no append-only file, no snapshots): what is not flushed yet is as safe as "
            "the memory of one process."
        )
    elif schedule:
        parts = schedule.split()
        pairs = zip(parts[::2], parts[1::2], strict=False)
        steps = ", ".join(f"{seconds} s after {count} changes" for seconds, count in pairs)
        message = (
            f"Redis keeps snapshots only ({steps}): a crash costs everything since the last one that is not flushed"
            f"{since}."
        )
    else:
        message = (
            f"Redis keeps no append-only file, at most snapshots{since}: what is not flushed yet is as safe as the "
            "memory of one process."
        )
    return Finding(
        "warning",
        "redis.persistence",
        message,
        "Set appendonly to yes: CONFIG SET appendonly yes, and in the server's configuration.",
    )


def _room(info: Mapping[str, Any]) -> list[Finding]:
    limit, used = info.get("maxmemory"), info.get("used_memory")
    if not limit or used is None or used < limit * _NEARLY_FULL:
        return []
    return [
        Finding(
            "warning",
            "redis.memory",
            f"Redis uses {used / limit:.0%} of its maxmemory ({limit / 1048576:.0f} MiB); when that is full, puts go "
            "straight to Postgres and are slower.",
            "Raise maxmemory, lower clean_ttl, or find out what else fills it.",
        )
    ]


def acknowledgement_findings(facts: BufferFacts, levels: Collection[str], replicas: int) -> list[Finding]:
    """Judge whether Redis can acknowledge at these levels."""
    code = "redis.acknowledgement"
    wanted = sorted(set(levels) & {"fsynced", "replicated"})
    if wanted and not facts.nodes:
        said = f"ack={wanted[0]!r} cannot be checked: Redis does not let this user run INFO."
        return [Finding("error", code, said, "Allow it: ACL SETUSER ... +info.")]
    for info in facts.nodes:
        version, has_file = str(info.get("redis_version", "0")), bool(info.get("aof_enabled"))
        numbers = tuple(int(part) if part.isdigit() else 0 for part in version.split(".")[:2])
        if "fsynced" in wanted and (numbers < (7, 2) or not has_file):
            has = f"this is Redis {version} with appendonly {'yes' if has_file else 'no'}."
            return [Finding("error", code, f"ack='fsynced' needs Redis 7.2 or Valkey with appendonly yes; {has}")]
        connected = int(info.get("connected_slaves", 0))
        if "replicated" in wanted and connected < replicas:
            has = f"this Redis has {connected}."
            needs = f"ack='replicated' with replicas={replicas} needs as many connected replicas; {has}"
            return [Finding("error", code, needs)]
    return []


# -- Postgres --------------------------------------------------------------------------------------------------------


def postgres_findings(row: Mapping[str, Any], *, schema: str | None) -> list[Finding]:
    """Judge a Postgres by the answer to `store.reads.ready()`."""
    version = row["version"]
    if version < _MIN_POSTGRES:
        old = f"Postgres {version // 10000} is too old:"
        return [Finding("error", "postgres.version", old, "use PostgreSQL 15 or newer.")]
    found = [Finding("ok", "postgres.version", f"PostgreSQL {version // 10000}.{version % 10000}.")]
    if row["standby"]:
        found.append(
            Finding(
                "error",
                "postgres.standby",
                "This Postgres is a standby: it takes no writes, and its answers can be old.",
                "Give the address of the primary, or both with target_session_attrs=read-write.",
            )
        )
    elif row["read_only"] == "on":
        found.append(
            Finding(
                "error",
                "postgres.read_only",
                "default_transaction_read_only is on: nothing can be flushed.",
                "Some providers set it when the disk is nearly full: make room. Otherwise ALTER ROLE ... RESET "
                "default_transaction_read_only.",
            )
        )
    if row["fsync"] == "off" or row["full_page_writes"] == "off":
        off = " and ".join(name for name in ("fsync", "full_page_writes") if row[name] == "off")
        found.append(
            Finding(
                "warning",
                "postgres.fsync",
                f"{off} is off: a crash of the machine can destroy the database.",
                f"Set {off} to on and restart Postgres, unless all its data may be lost.",
            )
        )
    if row["synchronous_commit"] in ("off", "local"):
        found.append(
            Finding(
                "ok",
                "postgres.synchronous_commit",
                f"synchronous_commit is {row['synchronous_commit']}; the saver sets it to on for each of its "
                "transactions.",
            )
        )
    if schema is not None and row["schema"] != schema:
        found.append(_schema_not_in_effect(schema, row["schema"]))
    return found


def _schema_not_in_effect(schema: str, current: str | None) -> Finding:
    return Finding(
        "error",
        "postgres.schema",
        f"schema={schema!r} is not in effect: this connection works in "
        + ("no schema at all." if current is None else f"{current!r}."),
        "Call setup() if the schema is not there yet. Otherwise something between drops the connection option "
        "search_path (a pooler), or your own pool does not set it: give it "
        "kwargs={'options': '-c search_path=...'}, or run ALTER ROLE ... IN DATABASE ... SET search_path = ... and let "
        "the pooler ignore the option (ignore_startup_parameters = options).",
    )


def check_schema(schema: str | None, current: str | None) -> None:
    """Refuse a connection that works in another schema.

    Raises:
        ConfigurationError: It does.
    """
    if schema is not None and current != schema:
        raise as_error(_schema_not_in_effect(schema, current))


def partition_findings(prefix: str, wanted: int, stored: int | None) -> list[Finding]:
    """Judge the number of partitions that is kept for a prefix; None if there is none yet."""
    if stored is None or stored == wanted:
        return []
    return [
        Finding(
            "error",
            "postgres.partitions",
            f"partitions={wanted}, but the threads of prefix {prefix!r} are divided into {stored}:",
            f"use partitions={stored}, or another prefix.",
        )
    ]


# -- clocks ----------------------------------------------------------------------------------------------------------


def clock_findings(clocks: Clocks) -> list[Finding]:
    """Judge the clocks by what is certain: the time that a question took is no difference."""
    if not clocks.readings:
        return []
    here = Reading("this machine", 0.0, 0.0, 0.0)
    most, names = 0.0, ("", "")
    for one, other in combinations([here, *clocks.readings], 2):
        (low, high), (other_low, other_high) = one.ahead, other.ahead
        certain = max(other_low - high, low - other_high, 0.0)
        if certain > most:
            most, names = certain, (one.name, other.name)
    if most <= _SKEW_WARNING:
        return [Finding("ok", "clock.skew", "The clocks agree to within a second, as far as can be measured.")]
    return [
        Finding(
            "error" if most > _SKEW_ERROR else "warning",
            "clock.skew",
            f"The clocks of {names[0]} and {names[1]} differ by at least {most:.1f} s. Checkpoint ids are ordered by "
            "time: a machine that is behind can write checkpoints that look older than those before them.",
            "Synchronise the clocks (NTP).",
        )
    ]
