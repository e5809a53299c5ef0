"""What is stored: checkpoint, blob and write records, and how a call's arguments become them.

Not here: where records lie (`buffer/keys.py`, `store/`) and how two answers are merged (`merge.py`). Everything is
serialised when `put` or `put_writes` is called, never later: channels may hand over containers that change
afterwards.

A *blob* is one version of one channel; a *ref* names it inside its namespace (`CHANNEL NUL VERSION`). A *write* is a
pending write of a task. *Inline* values stand in the checkpoint's own JSON, as LangGraph's tables have it:
None, booleans, numbers and strings; what JSONB could not hold exactly becomes a blob, which LangGraph's own
saver reads back as well.

Payloads in Redis, where `L` is a big-endian 32-bit length before what follows:

    checkpoint   L parent, L (L ref)*, L metadata JSON, checkpoint JSON
    blob         L type, bytes
    write        flags (1: overwrites), L channel, L type, L task path, bytes
"""

from __future__ import annotations

import contextlib
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    get_checkpoint_id,
    get_serializable_checkpoint_metadata,
)
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.serde.types import _DeltaSnapshot

from checkpointer.errors import InvalidConfigError, UnserializableValueError
from checkpointer.options import ACKS
from checkpointer.sanitize import (
    Change,
    NonFinite,
    dump_json,
    find_unserializable,
    is_inlinable,
    json_fallback,
    may_hold_non_finite,
    sanitize_value,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from langchain_core.runnables import RunnableConfig
    from langgraph.checkpoint.base import ChannelVersions, Checkpoint, CheckpointMetadata
    from langgraph.checkpoint.serde.base import SerializerProtocol

    from checkpointer.options import Ack


_LENGTH = struct.Struct(">I")

EMPTY = "empty"
"""The blob type of a channel that has a version but no value, as LangGraph's tables have it."""

_SCALARS = (str, int, float, bool)

# A B-tree entry of Postgres holds at most 2,704 bytes (a third of a page), and every id is part of a key.
_KEY_LIMIT = 2_600


class Blob(NamedTuple):
    """One version of one channel; `data` is None for `EMPTY`."""

    channel: str
    version: str
    type: str
    data: bytes | None

    @property
    def ref(self) -> str:
        """Its name inside the namespace."""
        return f"{self.channel}\0{self.version}"


class Write(NamedTuple):
    """One pending write; `overwrite` if a later one of the same index replaces it."""

    task_id: str
    idx: int
    channel: str
    type: str
    task_path: str
    data: bytes
    overwrite: bool


class CheckpointRow(NamedTuple):
    """A checkpoint as it is stored: JSON texts and the refs of the blobs that it needs."""

    checkpoint_id: str
    parent_id: str | None
    checkpoint: bytes
    metadata: bytes
    refs: tuple[str, ...]


class Address(NamedTuple):
    """Where a call's records belong."""

    thread_id: str
    checkpoint_ns: str


@dataclass(slots=True)
class Put:
    """A `put`, serialised.

    Attributes:
        address: Thread and namespace.
        row: The checkpoint.
        blobs: The new versions.
        values: Every non-inline channel value by ref, to complete a head whose unchanged channels Redis lacks.
        origin: Namespace and id of the checkpoint that it continues: its parent, or of a subgraph's first one the
            root checkpoint that the subgraph was started from.
        changes: What was sanitised.
        step: The superstep, if the metadata tells.
        run_id: The run, if the call tells.
    """

    address: Address
    row: CheckpointRow
    blobs: list[Blob]
    values: dict[str, Any]
    origin: tuple[str, str] | None
    changes: list[Change]
    step: int | None
    run_id: str | None
    ack: Ack | None


@dataclass(slots=True)
class PutWrites:
    """A `put_writes`, serialised."""

    address: Address
    checkpoint_id: str
    writes: list[Write]
    changes: list[Change]
    run_id: str | None
    ack: Ack | None


class Codec:
    """Serialises with a saver's serializer and its rule for non-finite numbers."""

    def __init__(self, serde: SerializerProtocol, non_finite: NonFinite) -> None:
        self._serde = serde
        self._non_finite = non_finite
        # Only this serializer's bytes can be searched for non-finite floats; others, ciphers above all, are
        # opaque, so that their values have to be walked first.
        self._searchable = type(serde) is JsonPlusSerializer

    def dump(self, value: Any, path: str, changes: list[Change]) -> tuple[str, bytes]:
        """Serialise a value; what is sanitised is added to `changes`.

        Raises:
            NonFiniteValueError: With `non_finite="raise"`.
            UnserializableValueError: The serializer refuses the value.
        """
        sanitizing = self._non_finite != "keep"
        if sanitizing and not self._searchable:
            value = self._sanitize(value, path, changes)
        try:
            kind, data = self._serde.dumps_typed(value)
        except Exception as exc:  # noqa: BLE001 - a serializer may raise anything; it is kept as the cause
            return self._dump_refused(value, path, changes, exc)
        if sanitizing and self._searchable and kind == "msgpack" and may_hold_non_finite(data):
            clean = self._sanitize(value, path, changes)
            if clean is not value:
                kind, data = self._serde.dumps_typed(clean)
        return kind, bytes(data)

    def _dump_refused(self, value: Any, path: str, changes: list[Change], cause: Exception) -> tuple[str, bytes]:
        """Serialise what the serializer refuses as it is.

        Sanitised it may pass (a NumPy NaN becomes None); integers over 64 bits fit into JSON, which LangGraph reads.
        """
        if self._searchable:
            clean = value if self._non_finite == "keep" else self._sanitize(value, path, changes)
            if clean is not value:
                with contextlib.suppress(Exception):
                    kind, data = self._serde.dumps_typed(clean)
                    return kind, bytes(data)
            text = json_fallback(clean)
            if text is not None:
                return "json", text
        where = find_unserializable(value, self._serde.dumps_typed)
        raise UnserializableValueError(
            f"{path}{where} cannot be serialised ({type(cause).__name__}: {cause}). Store a plain value, a dataclass, "
            "a pydantic model or a message there, or give the saver a serializer that knows this type."
        ) from cause

    def _sanitize(self, value: Any, path: str, changes: list[Change]) -> Any:
        if isinstance(value, _DeltaSnapshot):
            # A named tuple that stands for its channel's value, not a part of the state.
            inner, found = sanitize_value(value.value, path, self._non_finite)
            changes += found
            return value if inner is value.value else _DeltaSnapshot(inner)
        value, found = sanitize_value(value, path, self._non_finite)
        changes += found
        return value

    def encode_put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> Put:
        """Serialise the arguments of `put`.

        Raises:
            InvalidConfigError: An id is missing or cannot be stored.
            NonFiniteValueError: With `non_finite="raise"`.
            UnserializableValueError: A value cannot be serialised.
        """
        address = address_of(config, need_ns=True)
        changes: list[Change] = []
        versions = checkpoint["channel_versions"]
        texts = {
            checked_text(channel, "a channel's name"): version_text(version) for channel, version in versions.items()
        }
        inline: dict[str, Any] = {}
        values: dict[str, Any] = {}
        for channel, value in checkpoint["channel_values"].items():
            if isinstance(value, _DeltaSnapshot):
                inline[channel] = True
                values[channel] = value
            elif value is not None and not isinstance(value, _SCALARS):
                values[channel] = value
            elif is_inlinable(value) or channel not in versions:
                inline[channel] = value
            else:
                if isinstance(value, float):
                    value = self._sanitize(value, f"channel_values.{channel}", changes)
                (inline if value is None else values)[channel] = value
        blobs = [
            Blob(
                channel,
                version_text(version),
                *self.dump(values[channel], f"channel_values.{channel}", changes),
            )
            for channel, version in new_versions.items()
            if channel in values
        ]
        by_ref = {f"{channel}\0{texts[channel]}": value for channel, value in values.items() if channel in texts}
        checkpoint_id = checked_text(checkpoint["id"], "checkpoint['id']")
        text, found = dump_json({**checkpoint, "channel_values": inline}, "checkpoint", self._non_finite)
        changes += found
        merged = get_serializable_checkpoint_metadata(config, metadata)
        metadata_text, found = dump_json(merged, "metadata", self._non_finite)
        changes += found
        for channel, version in texts.items():
            _check_key(address, channel, version)
        parent = get_checkpoint_id(config) or None
        _check_key(address, checkpoint_id)
        row = CheckpointRow(
            checkpoint_id,
            checked_text(parent, "checkpoint_id") if parent is not None else None,
            text,
            metadata_text,
            (*by_ref, *_kept_snapshots(merged, checkpoint, values)),
        )
        step = merged.get("step")
        origin = origin_of(address.checkpoint_ns, row.parent_id, merged)
        return Put(
            address,
            row,
            blobs,
            by_ref,
            origin,
            changes,
            step if isinstance(step, int) else None,
            run_id_of(config),
            ack_of(config),
        )

    def encode_blobs(self, put: Put, positions: Sequence[int]) -> list[Blob]:
        """Serialise the needed blobs at these positions (from 1) of the refs, as far as the put has the values."""
        blobs = []
        for position in positions:
            ref = put.row.refs[position - 1]
            if ref not in put.values:
                continue
            channel, _, version = ref.partition("\0")
            blobs.append(Blob(channel, version, *self.dump(put.values[ref], f"channel_values.{channel}", [])))
        return blobs

    def encode_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str
    ) -> PutWrites:
        """Serialise the arguments of `put_writes`.

        Raises:
            InvalidConfigError: An id is missing or cannot be stored.
            NonFiniteValueError: With `non_finite="raise"`.
            UnserializableValueError: A value cannot be serialised.
        """
        address = address_of(config, need_ns=True)
        checkpoint_id = get_checkpoint_id(config)
        if not checkpoint_id:
            raise InvalidConfigError(
                "put_writes needs config['configurable']['checkpoint_id']: the checkpoint that the writes belong to."
            )
        _check_key(address, checked_text(checkpoint_id, "checkpoint_id"), checked_text(task_id, "task_id"))
        checked_text(task_path, "task_path")
        changes: list[Change] = []
        overwrite = all(channel in WRITES_IDX_MAP for channel, _ in writes)
        # Repeated keys in one call: the first one stays, or with special channels the last, as in the table.
        rows: dict[int, Write] = {}
        for position, (channel, value) in enumerate(writes):
            idx = WRITES_IDX_MAP.get(channel, position)
            if idx in rows and not overwrite:
                continue
            kind, data = self.dump(value, f"writes[{position}].{channel}", changes)
            rows[idx] = Write(task_id, idx, checked_text(channel, "a channel's name"), kind, task_path, data, overwrite)
        return PutWrites(address, checkpoint_id, list(rows.values()), changes, run_id_of(config), ack_of(config))


def _kept_snapshots(metadata: Any, checkpoint: Checkpoint, values: dict[str, Any]) -> list[str]:
    """Return the refs of delta channels that have not changed since their snapshot.

    LangGraph hands such a channel over without a value, but the tables join its snapshot by the version, which is
    still the same.
    """
    versions = checkpoint["channel_versions"]
    counters = metadata.get("counters_since_delta_snapshot") or {}
    return [
        f"{channel}\0{version_text(versions[channel])}"
        for channel, (updates, _) in counters.items()
        if updates == 0 and channel in versions and channel not in values
    ]


def origin_of(ns: str, parent_id: str | None, metadata: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return namespace and id of the checkpoint that another one continues, or None for the first of a thread."""
    if parent_id is not None:
        return ns, parent_id
    parents = metadata.get("parents")
    root = parents.get("") if ns and isinstance(parents, dict) else None
    # An id that Postgres cannot store is not one of a checkpoint.
    return ("", root) if isinstance(root, str) and root and root.isascii() and "\0" not in root else None


def version_text(version: str | float) -> str:
    """Return a version as the blob table has it: the text that JSONB gives back for it."""
    if isinstance(version, str):
        return checked_text(version, "a channel's version")
    return dump_json(version, "channel_versions", "raise")[0].decode()


def checked_text(value: Any, what: str) -> str:
    """Check an id or a name that becomes TEXT in Postgres.

    Raises:
        InvalidConfigError: It is no string or cannot be stored.
    """
    if type(value) is str and value.isascii() and "\0" not in value:
        return value
    if not isinstance(value, str):
        raise InvalidConfigError(f"{what} must be a string, not {type(value).__name__}: {value!r}.")
    if "\0" in value:
        raise InvalidConfigError(f"{what} holds a NUL character, which Postgres cannot store: {value!r}.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as exc:
            raise InvalidConfigError(f"{what} holds a lone surrogate, which Postgres cannot store: {value!r}.") from exc
    return value


def _check_key(address: Address, *ids: str) -> None:
    parts = (*address, *ids)
    if sum(map(len, parts)) * 4 > _KEY_LIMIT:  # a character takes at most four bytes
        size = sum(len(part.encode()) for part in parts)
        if size > _KEY_LIMIT:
            raise InvalidConfigError(
                f"thread_id, checkpoint_ns and {ids[0]!r} are {size} bytes together; an index entry of Postgres holds "
                f"{_KEY_LIMIT}. Use shorter ids."
            )


def thread_text(thread_id: Any) -> str:
    """Check a thread's id.

    Raises:
        InvalidConfigError: It is no string or cannot be stored.
    """
    if isinstance(thread_id, int) and not isinstance(thread_id, bool):
        thread_id = str(thread_id)
    return checked_text(thread_id, "thread_id")


def address_of(config: RunnableConfig, *, need_ns: bool = False) -> Address:
    """Read thread and namespace from a config.

    Raises:
        InvalidConfigError: One is missing or cannot be stored.
    """
    configurable = config.get("configurable") if isinstance(config, dict) else None
    if not configurable or "thread_id" not in configurable:
        raise InvalidConfigError(
            "config['configurable']['thread_id'] is missing: call the graph with "
            "{'configurable': {'thread_id': 'some-id'}}."
        )
    if need_ns and "checkpoint_ns" not in configurable:
        raise InvalidConfigError("config['configurable']['checkpoint_ns'] is missing: use '' for the root graph.")
    ns = configurable.get("checkpoint_ns", "")
    return Address(thread_text(configurable["thread_id"]), checked_text("" if ns is None else ns, "checkpoint_ns"))


def run_id_of(config: RunnableConfig) -> str | None:
    """Return the run of a call, if the config tells."""
    run_id = config.get("run_id") or (config.get("metadata") or {}).get("run_id")
    return str(run_id) if run_id else None


def ack_of(config: RunnableConfig) -> Ack | None:
    """Return the acknowledgement level that a call asks for, or None.

    Raises:
        InvalidConfigError: There is no such level.
    """
    ack = config["configurable"].get("ack")
    if ack is not None and ack not in ACKS:
        raise InvalidConfigError(f"config['configurable']['ack'] is {ack!r}: use one of {', '.join(ACKS)}.")
    return cast("Ack | None", ack)


def saved_config(address: Address, checkpoint_id: str) -> RunnableConfig:
    """Return the config that names a stored checkpoint."""
    return {
        "configurable": {
            "thread_id": address.thread_id,
            "checkpoint_ns": address.checkpoint_ns,
            "checkpoint_id": checkpoint_id,
        }
    }


def _sized(data: bytes) -> bytes:
    return _LENGTH.pack(len(data)) + data


def _take(data: bytes, at: int) -> tuple[bytes, int]:
    (size,) = _LENGTH.unpack_from(data, at)
    at += 4
    if at + size > len(data):
        raise ValueError("the payload is cut off")
    return data[at : at + size], at + size


def pack_refs(refs: Sequence[str]) -> bytes:
    """Pack a list of strings."""
    return b"".join(_sized(ref.encode()) for ref in refs)


def _unpack_refs(data: bytes) -> tuple[str, ...]:
    refs, at = [], 0
    while at < len(data):
        ref, at = _take(data, at)
        refs.append(ref.decode())
    return tuple(refs)


def pack_checkpoint(row: CheckpointRow) -> bytes:
    """Pack a checkpoint's payload."""
    parent, refs = (row.parent_id or "").encode(), pack_refs(row.refs)
    size = _LENGTH.pack
    return b"".join(
        (size(len(parent)), parent, size(len(refs)), refs, size(len(row.metadata)), row.metadata, row.checkpoint)
    )


def unpack_checkpoint(checkpoint_id: str, payload: bytes) -> CheckpointRow:
    """Read a checkpoint's payload."""
    parent, at = _take(payload, 0)
    refs, at = _take(payload, at)
    metadata, at = _take(payload, at)
    return CheckpointRow(checkpoint_id, parent.decode() or None, payload[at:], metadata, _unpack_refs(refs))


def pack_blob(blob: Blob) -> bytes:
    """Pack a blob's payload."""
    return _sized(blob.type.encode()) + (blob.data or b"")


def unpack_blob(ref: str, payload: bytes) -> Blob:
    """Read a blob's payload."""
    channel, _, version = ref.partition("\0")
    end = 4 + _LENGTH.unpack_from(payload)[0]
    if end > len(payload):
        raise ValueError("the payload is cut off")
    kind = payload[4:end].decode()
    return Blob(channel, version, kind, None if kind == EMPTY else payload[end:])


def pack_write(write: Write) -> bytes:
    """Pack a write's payload."""
    return b"".join(
        (
            b"\1" if write.overwrite else b"\0",
            _sized(write.channel.encode()),
            _sized(write.type.encode()),
            _sized(write.task_path.encode()),
            write.data,
        )
    )


def unpack_write(task_id: str, idx: int, payload: bytes) -> Write:
    """Read a write's payload."""
    # One for each record of a flush: spelled out, since calls and slices are what it costs.
    size_of = _LENGTH.unpack_from
    channel_end = 5 + size_of(payload, 1)[0]
    kind_end = channel_end + 4 + size_of(payload, channel_end)[0]
    path_end = kind_end + 4 + size_of(payload, kind_end)[0]
    if path_end > len(payload):
        raise ValueError("the payload is cut off")
    return Write(
        task_id,
        idx,
        payload[5:channel_end].decode(),
        payload[channel_end + 4 : kind_end].decode(),
        payload[kind_end + 4 : path_end].decode(),
        payload[path_end:],
        payload[0] == 1,
    )
