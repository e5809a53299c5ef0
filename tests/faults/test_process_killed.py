"""Nothing acknowledged is lost when the process is killed at a random moment."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from typing import TYPE_CHECKING, Any

import crash_child
import psycopg
import pytest
from helpers import wait_until
from langgraph.checkpoint.postgres import PostgresSaver

from checkpointer import BufferedPostgresSaver

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

ROUNDS = 20


def read_acknowledged(pipe: Connection, wanted: int) -> bytes:
    """Read until that many acknowledgements have come."""
    text = b""
    while text.count(b"\n") < wanted:
        chunk = os.read(pipe.fileno(), 65536)
        assert chunk, "the process ended before it was killed"
        text += chunk
    return text


def read_rest(pipe: Connection) -> bytes:
    text = b""
    while chunk := os.read(pipe.fileno(), 65536):
        text += chunk
    return text


@pytest.mark.timeout(300)
def test_every_acknowledged_put_is_in_postgres_after_sigkill_and_recovery(
    postgres_uri: str, redis_url: str, prefix: str
) -> None:
    seed = int(os.environ.get("CRASH_SEED", random.SystemRandom().randrange(2**32)))
    print(f"CRASH_SEED={seed}")
    rng = random.Random(seed)
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["crash_child"])
    with BufferedPostgresSaver.from_conn_string(
        postgres_uri, redis_url=redis_url, prefix=prefix, hooks=(), triggers=frozenset()
    ) as saver:
        saver.setup()
    puts = writes = found_in_buffer = 0
    for round_number in range(ROUNDS):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(
            target=crash_child.run, args=(postgres_uri, redis_url, prefix, theirs, bool(round_number % 2))
        )
        child.start()
        theirs.close()
        text = read_acknowledged(ours, rng.randrange(1, 120))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        text += read_rest(ours)
        lines = [line.split("\t") for line in text.decode().split("\n")[:-1]]
        with BufferedPostgresSaver.from_conn_string(
            postgres_uri, redis_url=redis_url, prefix=prefix, hooks=(), triggers=frozenset()
        ) as second:
            # The dead process' connection may still hold its partitions for a moment.
            report = wait_until(second.flush)
            found_in_buffer += report.checkpoints
        puts += sum(line[0] == "put" for line in lines)
        writes += sum(int(line[5]) for line in lines if line[0] == "writes")
        assert_all_in_postgres(postgres_uri, lines, f"round {round_number}, CRASH_SEED={seed}")
    print(
        f"acknowledged: {puts} puts, {writes} writes; {found_in_buffer} checkpoints were still in the buffer; lost: 0"
    )
    assert found_in_buffer > 0, "no kill hit a moment with unflushed records: the test shows nothing"


def assert_all_in_postgres(uri: str, lines: list[list[str]], when: str) -> None:
    with psycopg.connect(uri, autocommit=True) as conn:
        checkpoints = {
            tuple(row) for row in conn.execute("SELECT thread_id, checkpoint_ns, checkpoint_id FROM checkpoints")
        }
        written: dict[tuple[str, ...], int] = {}
        for *key, count in conn.execute(
            "SELECT thread_id, checkpoint_ns, checkpoint_id, task_id, count(*) FROM checkpoint_writes "
            "GROUP BY 1, 2, 3, 4"
        ):
            written[tuple(key)] = count
        for kind, *key in lines:
            if kind == "put":
                assert tuple(key) in checkpoints, f"{when}: acknowledged checkpoint {key} is lost"
            else:
                assert written.get(tuple(key[:4]), 0) >= int(key[4]), f"{when}: acknowledged writes {key} are lost"
        # No half checkpoint: every blob that a checkpoint names is there, and every parent.
        (orphans,) = conn.execute(
            "SELECT count(*) FROM checkpoints c WHERE parent_checkpoint_id IS NOT NULL AND NOT EXISTS "
            "(SELECT 1 FROM checkpoints p WHERE (p.thread_id, p.checkpoint_ns, p.checkpoint_id) = "
            "(c.thread_id, c.checkpoint_ns, c.parent_checkpoint_id))"
        ).fetchone() or (None,)
        assert orphans == 0, f"{when}: {orphans} checkpoints without their parent"
    with PostgresSaver.from_conn_string(uri) as stock:
        thread = lines[0][1]
        for found in stock.list({"configurable": {"thread_id": thread, "checkpoint_ns": ""}}):
            values = found.checkpoint["channel_values"]
            if found.metadata["step"] >= 1:
                assert values["xs"], f"{when}: a channel is missing in {found.config}"


def test_a_killed_runs_thread_is_resumed_by_another_process(postgres_uri: str, redis_url: str, prefix: str) -> None:
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["crash_child"])
    options: Any = {"redis_url": redis_url, "prefix": prefix, "hooks": ()}
    with BufferedPostgresSaver.from_conn_string(postgres_uri, **options) as saver:
        saver.setup()
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=crash_child.run, args=(postgres_uri, redis_url, prefix, theirs, False))
        child.start()
        theirs.close()
        text = read_acknowledged(ours, 60)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        text += read_rest(ours)
        last = [line.split("\t") for line in text.decode().split("\n") if line.startswith("put\t")]
        thread = last[0][1]
        newest = max(line[3] for line in last if line[2] == "")
        graph = crash_child.build(saver)
        config: Any = {"configurable": {"thread_id": thread}}
        state = graph.get_state(config)
        assert state.config["configurable"]["checkpoint_id"] >= newest
        assert state.tasks
        before = len(state.values["xs"])
        for _ in graph.stream(None, config):
            if len(graph.get_state(config).values["xs"]) > before + 5:
                break
        assert len(graph.get_state(config).values["xs"]) > before + 5
