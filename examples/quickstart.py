"""A tool-calling agent on `BufferedPostgresSaver`; its history is read back by LangGraph's own `PostgresSaver`.

Run it: python examples/quickstart.py
"""

from __future__ import annotations

import asyncio

from _agent import addresses, ask, build_agent, thread
from langgraph.checkpoint.postgres import PostgresSaver

from checkpointer import BufferedPostgresSaver


def main() -> None:
    """Run the example."""
    config = thread("quickstart")
    with addresses() as at:
        # The swap: this line was `PostgresSaver.from_conn_string(at.postgres_uri)`.
        with BufferedPostgresSaver.from_conn_string(at.postgres_uri, redis_url=at.redis_url) as saver:
            saver.setup()
            agent = build_agent(saver)

            question = "What is the weather in Paris and Oslo?"
            state = agent.invoke(ask(question), config)
            print(f"you:   {question}\nagent: {state['messages'][-1].content}\n")

            # The same object serves the asynchronous API; the thread goes on where it was.
            question = "What did I ask before?"
            state = asyncio.run(agent.ainvoke(ask(question), config))
            print(f"you:   {question}\nagent: {state['messages'][-1].content}\n")

            # Not needed: a run's end flushes, and so does leaving the block. Here to show what it tells.
            report = saver.flush(config["configurable"]["thread_id"])
            print(f"everything is in Postgres: {bool(report)}")
            ours = [found.checkpoint["id"] for found in saver.list(config)]

        with PostgresSaver.from_conn_string(at.postgres_uri) as stock:
            history = list(stock.list(config))
            print(f"stock PostgresSaver reads {len(history)} checkpoints, the buffered one {len(ours)}")
            print(f"the same ones: {[found.checkpoint['id'] for found in history] == ours}")
            last = build_agent(stock).get_state(config).values["messages"]
            print(f"the same conversation: {last == state['messages']} ({len(last)} messages)")


if __name__ == "__main__":
    main()
