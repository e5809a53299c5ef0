"""LangGraph's own conformance suite, through both APIs, wherever the records happen to be when they are read."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from langgraph.checkpoint.conformance import checkpointer_test, validate
from langgraph.checkpoint.conformance.report import ProgressCallbacks

from checkpointer import BufferedPostgresSaver

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from langchain_core.runnables import RunnableConfig
    from langgraph.checkpoint.base import CheckpointTuple

CAPABILITIES = {
    "put",
    "put_writes",
    "get_tuple",
    "list",
    "delete_thread",
    "delete_for_runs",
    "copy_thread",
    "prune",
}
CASES = 81


class FlushedBeforeReads(BufferedPostgresSaver):
    """Reads find nothing dirty."""

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        assert await self.aflush()
        return await super().aget_tuple(config)

    async def alist(self, config: RunnableConfig | None, **options: Any) -> AsyncIterator[CheckpointTuple]:
        assert await self.aflush()
        async for found in super().alist(config, **options):
            yield found


class ThroughSyncApi(BufferedPostgresSaver):
    """The suite is asynchronous; this answers it with the synchronous methods."""

    async def aput(self, *args: Any, **named: Any) -> RunnableConfig:
        return await asyncio.to_thread(self.put, *args, **named)

    async def aput_writes(self, *args: Any, **named: Any) -> None:
        await asyncio.to_thread(self.put_writes, *args, **named)

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        return await asyncio.to_thread(self.get_tuple, config)

    async def alist(self, config: RunnableConfig | None, **options: Any) -> AsyncIterator[CheckpointTuple]:
        for found in await asyncio.to_thread(lambda: list(self.list(config, **options))):
            yield found

    async def adelete_thread(self, thread_id: str) -> None:
        await asyncio.to_thread(self.delete_thread, thread_id)

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        await asyncio.to_thread(self.delete_for_runs, run_ids)

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        await asyncio.to_thread(self.copy_thread, source_thread_id, target_thread_id)

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        await asyncio.to_thread(lambda: self.prune(thread_ids, strategy=strategy))


class ThroughSyncApiFlushedBeforeReads(ThroughSyncApi):
    """Both."""

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        assert self.flush()
        return super().get_tuple(config)

    def list(self, config: RunnableConfig | None, **options: Any) -> Any:
        assert self.flush()
        return super().list(config, **options)


async def assert_conforms(make: type[BufferedPostgresSaver], uri: str, **settings: Any) -> None:
    """Run all cases; each failed one is named in the assertion, with its error."""

    @checkpointer_test(name=make.__name__)
    async def registered() -> AsyncIterator[BufferedPostgresSaver]:
        async with make.from_conn_string(uri, hooks=(), **settings) as saver:
            await saver.asetup()
            yield saver

    passed: list[str] = []
    failed: list[str] = []

    def on_result(capability: str, case: str, ok: bool, error: str | None) -> None:
        (passed if ok else failed).append(f"{capability}: {case}" + (f"\n{error}" if error else ""))

    report = await validate(registered, progress=ProgressCallbacks(on_test_result=on_result))
    assert not failed, f"{len(failed)} of {CASES} cases failed:\n\n" + "\n".join(failed)
    assert {name for name, result in report.results.items() if result.detected} == CAPABILITIES
    assert sum(result.tests_passed for result in report.results.values()) == CASES
    assert sum(result.tests_failed for result in report.results.values()) == 0
    # A case that ran is one that reported: the suite passes an empty saver with nothing detected, too.
    assert len(passed) == CASES


APIS = pytest.mark.parametrize("make", [BufferedPostgresSaver, ThroughSyncApi], ids=["async", "sync"])


@APIS
async def test_all_cases_pass_with_the_default_triggers(
    make: type[BufferedPostgresSaver], postgres_uri: str, redis_url: str, prefix: str
) -> None:
    await assert_conforms(make, postgres_uri, redis_url=redis_url, prefix=prefix)


@APIS
async def test_all_cases_pass_while_nothing_is_flushed_by_itself(
    make: type[BufferedPostgresSaver], postgres_uri: str, redis_url: str, prefix: str
) -> None:
    await assert_conforms(make, postgres_uri, redis_url=redis_url, prefix=prefix, triggers=frozenset())


@pytest.mark.parametrize("make", [FlushedBeforeReads, ThroughSyncApiFlushedBeforeReads], ids=["async", "sync"])
async def test_all_cases_pass_with_a_flush_before_each_read(
    make: type[BufferedPostgresSaver], postgres_uri: str, redis_url: str, prefix: str
) -> None:
    await assert_conforms(make, postgres_uri, redis_url=redis_url, prefix=prefix, triggers=frozenset())


@APIS
async def test_all_cases_pass_while_the_flusher_races_with_them(
    make: type[BufferedPostgresSaver], postgres_uri: str, redis_url: str, prefix: str
) -> None:
    await assert_conforms(make, postgres_uri, redis_url=redis_url, prefix=prefix, flush_size=1, flush_age=0.01)
