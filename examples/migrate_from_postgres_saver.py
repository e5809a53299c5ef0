"""Swap in, and out again: a run begun with stock `PostgresSaver` goes on with the buffered one, and ends with stock.

Both use LangGraph's own tables as they are, so there is nothing to convert, in either direction.

Run it: python examples/migrate_from_postgres_saver.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from _agent import addresses, ask, build_agent, thread
from langgraph.checkpoint.postgres import PostgresSaver

from checkpointer import BufferedPostgresSaver

if TYPE_CHECKING:
    from langchain_core.runnables import RunnableConfig
    from langgraph.checkpoint.base import BaseCheckpointSaver


def main() -> None:
    """Run the example."""
    config = thread("migrate")
    with addresses() as at:
        print("1. PostgresSaver: the application as it is")
        with PostgresSaver.from_conn_string(at.postgres_uri) as saver:
            saver.setup()
            agent = build_agent(saver)
            # Stops before each call of the tool, as a run does that waits for a person, or for a deployment.
            agent.invoke(ask("What is the weather in Paris and Oslo?"), config, interrupt_before=["tools"])
            before = tell(saver, config)

        print("\n2. BufferedPostgresSaver: the same run goes on in the same tables")
        with BufferedPostgresSaver.from_conn_string(at.postgres_uri, redis_url=at.redis_url) as saver:
            # Adds tables of its own beside LangGraph's, once.
            saver.setup()
            agent = build_agent(saver)
            # No input: the run goes on from its last checkpoint.
            agent.invoke(None, config, interrupt_before=["tools"])
            tell(saver, config)
            # Leaving the block flushes what this process has buffered. With several processes, stop all of them and
            # run `checkpointer flush` before you go back to stock: it says whether anything had to stay in Redis.
            report = saver.flush()
            print(f"   everything is in Postgres: {bool(report)}")

        print("\n3. PostgresSaver again: back in one line")
        with PostgresSaver.from_conn_string(at.postgres_uri) as saver:
            agent = build_agent(saver)
            agent.invoke(None, config)
            after = tell(saver, config)
            print(f"   the checkpoints of step 1 are still there, unchanged: {after[-len(before) :] == before}")


def tell(saver: BaseCheckpointSaver[Any], config: RunnableConfig) -> list[Any]:
    """Print where a thread is, and return its checkpoints, the newest first."""
    history = list(saver.list(config))
    state = build_agent(saver).get_state(config)
    last = state.values["messages"][-1]
    said = last.content or f"(calls the tool for {last.tool_calls[0]['args']['city']})"
    print(f"   {len(history)} checkpoints; next: {', '.join(state.next) or 'nothing'}; the agent: {said}")
    return [(found.checkpoint, found.metadata, found.parent_config) for found in history]


if __name__ == "__main__":
    main()
