"""Postgres is killed in the middle of a run and comes back: who is told what, and is anything lost?

Run it: python examples/outage.py   (always on private servers, since it kills one)
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import psycopg
from _agent import NotingSaver, ask, build_agent, thread
from langgraph.checkpoint.postgres import PostgresSaver
from psycopg.rows import dict_row

from checkpointer import embedded
from observability import aread_thread_log, queries, subscribe_run_events

QUESTION = "What is the weather in Paris, Oslo, Lima, Tunis and Quito?"


async def watch(thread_id: str, recovered: asyncio.Event) -> None:
    """Print what a browser that watches this thread is sent."""
    async with subscribe_run_events(thread_id) as events:
        async for event in events:
            print(f"   [user's screen] {event['severity']}: {event['message']}")
            if event.get("outcome") == "recovered":
                recovered.set()


async def main() -> None:
    """Run the example."""
    config = thread("outage")
    thread_id = config["configurable"]["thread_id"]
    with embedded.servers() as servers:
        async with NotingSaver.from_conn_string(servers.postgres_uri, redis_url=servers.redis_url) as saver:
            assert isinstance(saver, NotingSaver)
            await saver.asetup()
            agent = build_agent(saver, seconds_per_call=0.3)
            recovered = asyncio.Event()
            watcher = asyncio.create_task(watch(thread_id, recovered))

            print("The run, with Postgres killed after the second step:")
            async for step in agent.astream(ask(QUESTION), config, stream_mode="updates"):
                say(step)
                if len(saver.acknowledged) >= 3 and servers.postgres.is_alive():
                    await asyncio.to_thread(servers.postgres.kill)
                    print("   *** Postgres is killed (SIGKILL)")
            print("   the run has completed")

            report = await saver.aflush(thread_id)
            print(f"\nAsked now, the saver says: all in Postgres: {bool(report)}; waiting: {report.waiting} records")
            state = await agent.aget_state(config)
            print(f"The thread can still be read: {len(state.values['messages'])} messages")

            print("\n   *** Postgres is started again")
            await asyncio.to_thread(servers.postgres.start)
            await asyncio.wait_for(recovered.wait(), 30)
            report = await saver.aflush(thread_id)
            print(f"All in Postgres: {bool(report)}")

            print("\nThe thread's log:")
            await asyncio.to_thread(saver.hooks.flush)
            for line in await arrived_log(thread_id):
                print(f"   {line['level']}: {line['message']}")
            watcher.cancel()

            print("\nWhat an administrator finds in system_errors, without access to the machine:")
            await asyncio.to_thread(print_errors, servers.postgres_uri)
            acknowledged = saver.acknowledged

        with PostgresSaver.from_conn_string(servers.postgres_uri) as stock:
            stored = {found.checkpoint["id"] for found in stock.list(config)}
        print(f"\nThe saver acknowledged {len(acknowledged)} checkpoints; stock PostgresSaver reads {len(stored)}.")
        print(f"lost: {len(set(acknowledged) - stored)}")


async def arrived_log(thread_id: str) -> list[dict[str, Any]]:
    """Return the thread's log, once what was noted while Postgres was away has arrived there."""
    deadline = time.monotonic() + 60
    while True:
        lines = await aread_thread_log(thread_id)
        if any(line["level"] == "critical" for line in lines) or time.monotonic() > deadline:
            return list(lines)
        await asyncio.sleep(0.2)


def print_errors(postgres_uri: str) -> None:
    """Print what happened and what became of it, once it has arrived.

    What was reported while Postgres was away has waited in Redis, and arrives a few seconds after Postgres is back.
    Since everything was flushed then, the errors are resolved as they arrive: nobody has to look at them.
    """
    deadline = time.monotonic() + 60
    with psycopg.connect(postgres_uri, autocommit=True, row_factory=dict_row) as conn:
        while time.monotonic() < deadline:
            errors = conn.execute(
                "SELECT error_type, thread_id, error_message, resolved_by, resolution_notes FROM system_errors "
                "WHERE severity IN ('error', 'critical') ORDER BY created_at"
            ).fetchall()
            if len(errors) >= 2 and all(error["resolved_by"] for error in errors):
                break
            time.sleep(0.2)
        for error in errors:
            about = error["thread_id"] or "no single thread"
            print(f"   {error['error_type']} on {about}: {error['error_message']}")
            print(f"      resolved by {error['resolved_by']}: {error['resolution_notes']}")
        print(f"   query unresolved_criticals: {len(queries.run(conn, 'unresolved_criticals'))} rows")
        print("   query frequency_by_type_24h:")
        for row in queries.run(conn, "frequency_by_type_24h"):
            print(f"      {row['error_type']}: {row['occurrences']}, at worst {row['worst_severity']}")


def say(step: dict[str, Any]) -> None:
    """Print one step of the run."""
    for node, update in step.items():
        message = update["messages"][-1]
        print(f"   {node}: {message.content or message.tool_calls[0]['args']}")


if __name__ == "__main__":
    asyncio.run(main())
