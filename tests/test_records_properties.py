"""Properties of the codecs, the key layout and the merge of the two tiers."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from checkpointer import BufferedPostgresSaver, InvalidConfigError
from checkpointer.buffer.commands import BufferRead
from checkpointer.buffer.keys import KeyLayout, field, slot_of
from checkpointer.merge import Verdict, merge_writes, stands
from checkpointer.records import (
    Blob,
    CheckpointRow,
    Codec,
    Write,
    address_of,
    pack_blob,
    pack_checkpoint,
    pack_write,
    unpack_blob,
    unpack_checkpoint,
    unpack_write,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

ids = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20)
data = st.binary(max_size=50)


# -- codecs -------------------------------------------------------------------------------------------------------


@given(ids, st.none() | ids.filter(bool), data, data, st.lists(st.tuples(ids, ids), max_size=5))
def test_a_checkpoints_payload_reads_back_as_it_was(
    checkpoint_id: str, parent: str | None, checkpoint: bytes, metadata: bytes, refs: list[tuple[str, str]]
) -> None:
    row = CheckpointRow(checkpoint_id, parent, checkpoint, metadata, tuple("\0".join(ref) for ref in refs))
    assert unpack_checkpoint(checkpoint_id, pack_checkpoint(row)) == row


@given(ids, ids, ids.filter(lambda kind: kind != "empty"), data)
def test_a_blobs_payload_reads_back_as_it_was(channel: str, version: str, kind: str, value: bytes) -> None:
    blob = Blob(channel, version, kind, value)
    assert unpack_blob(blob.ref, pack_blob(blob)) == blob


@given(ids, st.integers(-4, 10**6), ids, ids, ids, data, st.booleans())
def test_a_writes_payload_reads_back_as_it_was(
    task: str, idx: int, channel: str, kind: str, path: str, value: bytes, overwrite: bool
) -> None:
    write = Write(task, idx, channel, kind, path, value, overwrite)
    assert unpack_write(task, idx, pack_write(write)) == write


@given(st.text(max_size=12))
def test_an_id_is_stored_as_it_is_or_refused(thread_id: str) -> None:
    config: Any = {"configurable": {"thread_id": thread_id}}
    try:
        address = address_of(config)
    except InvalidConfigError:
        assert "\0" in thread_id or not thread_id.isascii()
    else:
        assert address.thread_id == thread_id
        address.thread_id.encode()


@given(st.dictionaries(st.sampled_from("abcd"), st.none() | st.integers() | st.lists(st.integers(0, 9), max_size=3)))
def test_every_channel_is_either_inline_or_among_the_refs(values: dict[str, Any]) -> None:
    versions = dict.fromkeys(values, "1")
    checkpoint: Any = {
        "v": 4,
        "id": str(uuid6()),
        "ts": "",
        "channel_values": values,
        "channel_versions": versions,
        "versions_seen": {},
        "updated_channels": None,
    }
    config: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
    put = Codec(JsonPlusSerializer(), "null").encode_put(config, checkpoint, {}, versions)
    assert {ref.partition("\0")[0] for ref in put.row.refs} == {k for k, v in values.items() if isinstance(v, list)}
    assert {blob.ref for blob in put.blobs} == set(put.row.refs)


# -- key layout ---------------------------------------------------------------------------------------------------


@given(st.lists(ids, min_size=2, max_size=5), st.lists(ids, min_size=2, max_size=5))
def test_different_ids_never_name_the_same_field(one: list[str], other: list[str]) -> None:
    assert (field("w", *one) == field("w", *other)) == (one == other)


LAYOUT = KeyLayout("app", 32)


@given(ids, ids)
def test_the_keys_of_two_threads_never_meet(one: str, other: str) -> None:
    mine, theirs = LAYOUT.thread(one), LAYOUT.thread(other)
    assert len(set(mine)) == 7
    if one != other:
        assert not set(mine[2:]) & set(theirs)
    tag = mine.dirty[mine.dirty.index(b"{") + 1 : mine.dirty.index(b"}")]
    assert {key[key.index(b"{") + 1 : key.index(b"}")] for key in mine} == {tag}, "all keys lie in one slot"


@pytest.mark.parametrize("partitions", [1, 3, 32, 256])
def test_the_partitions_slots_are_spread_evenly(partitions: int) -> None:
    layout = KeyLayout("app", partitions)
    slots = []
    for partition in range(partitions):
        key = layout.state(partition)
        slots.append(slot_of(key[key.index(b"{") + 1 : key.index(b"}")]))
    assert [slot * partitions // 16384 for slot in slots] == list(range(partitions))


def test_a_slot_is_what_the_cluster_specification_says() -> None:
    assert slot_of(b"123456789") == 0x31C3


def test_threads_are_spread_over_the_partitions() -> None:
    counts = Counter(LAYOUT.partition_of(str(uuid6())) for _ in range(3200))
    assert set(counts) == set(range(32))
    assert max(counts.values()) < 200


# -- merge --------------------------------------------------------------------------------------------------------

writes = st.lists(
    st.builds(
        Write,
        st.sampled_from(("a", "b")),
        st.integers(-2, 2),
        st.just("c"),
        st.just("bytes"),
        st.just(""),
        data,
        st.booleans(),
    ),
    max_size=6,
    unique_by=lambda write: (write.task_id, write.idx),
)


@given(writes, st.lists(st.booleans(), min_size=6, max_size=6), writes)
def test_merged_writes_follow_the_tables_rules(stored: list[Write], dirty: list[bool], buffered: list[Write]) -> None:
    flags = dict(zip(((w.task_id, w.idx) for w in buffered), dirty, strict=False))
    merged = {(w.task_id, w.idx): w for w in merge_writes(stored, [(w, flags[w.task_id, w.idx]) for w in buffered])}
    in_store = {(w.task_id, w.idx): w for w in stored}
    in_buffer = {(w.task_id, w.idx): w for w in buffered}
    assert set(merged) == set(in_store) | set(in_buffer)
    for key, write in merged.items():
        if key in in_store and not (key in in_buffer and in_buffer[key].overwrite and flags[key]):
            assert write == in_store[key]
        else:
            assert write == in_buffer[key]


@given(st.integers(0, 9), st.none() | st.integers(0, 9), st.booleans(), st.integers(0, 2), st.integers(0, 2))
def test_redis_alone_is_believed_only_if_postgres_has_nothing_more(
    head: int, latest: int | None, dirty: bool, in_postgres: int, known: int
) -> None:
    write = Write("t", 0, "c", "bytes", "", b"", overwrite=False)
    read = BufferRead(head=str(head), dirty=dirty, complete=True, writes={str(head): [(write, False)] * known})
    verdict = Verdict(None if latest is None else str(latest), None, in_postgres, in_postgres)
    if stands(read, verdict):
        assert latest is None or latest <= head, "never older than what Postgres has"
        assert dirty or latest == head, "a flushed head must be there"
        assert in_postgres <= known, "no write of Postgres is missing"


# -- times to live ------------------------------------------------------------------------------------------------


@pytest.fixture
def saver(postgres_uri: str, redis_url: str, prefix: str) -> Iterator[BufferedPostgresSaver]:
    with BufferedPostgresSaver.from_conn_string(
        postgres_uri, redis_url=redis_url, prefix=prefix, hooks=(), triggers=frozenset()
    ) as found:
        found.setup()
        yield found


def test_nothing_that_is_not_in_postgres_has_a_time_to_live(saver: BufferedPostgresSaver) -> None:
    client, keys = saver._core.redis.client(), saver._core.commands.layout.thread("t")
    where: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
    for turn in range(3):
        checkpoint: Any = {
            "v": 4,
            "id": str(uuid6()),
            "ts": "",
            "channel_values": {"a": [turn]},
            "channel_versions": {"a": f"{turn}"},
            "versions_seen": {},
            "updated_channels": None,
        }
        where = saver.put(where, checkpoint, {}, {"a": f"{turn}"})
        saver.put_writes(where, [("a", turn)], "task")
        for key in (keys.dirty, keys.order, keys.writes, keys.facts, keys.state, keys.threads):
            assert client.ttl(key) == -1, key
        assert saver.flush()
        assert not client.exists(keys.dirty, keys.order)
        assert client.zscore(keys.threads, "t") is None
        for key in (keys.clean, keys.facts, keys.writes):
            assert 0 < client.ttl(key) <= saver.options.clean_ttl + 1, key
        assert client.hlen(keys.clean) == 3, "only the head stays: checkpoint, blob and write"
    saver.put_writes(where, [("b", 1)], "another task")
    for key in (keys.dirty, keys.order, keys.writes, keys.facts):
        assert client.ttl(key) == -1, key
