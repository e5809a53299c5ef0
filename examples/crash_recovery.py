"""A process is SIGKILLed in the middle of a run; the next one finds its buffer, saves it and resumes the thread.

Run it: python examples/crash_recovery.py   (always on private servers, which outlive the killed process)
"""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

from _agent import NotingSaver, ask, build_agent
from langgraph.checkpoint.postgres import PostgresSaver

from checkpointer import BufferedPostgresSaver, embedded

if TYPE_CHECKING:
    from langchain_core.runnables import RunnableConfig

    from checkpointer import CheckpointEvent

QUESTION = "What is the weather in Paris, Oslo, Lima, Tunis, Quito and Nairobi?"
CONFIG: RunnableConfig = {"configurable": {"thread_id": "crash"}}
CALLS_BEFORE_THE_CRASH = 3


class TellingSaver(NotingSaver):
    """Tells the parent of each checkpoint that the saver has acknowledged."""

    def _noted(self, saved: RunnableConfig) -> RunnableConfig:
        tell(f"acknowledged {saved['configurable']['checkpoint_id']}")
        return super()._noted(saved)


def doomed(postgres_uri: str, redis_url: str) -> None:
    """Be the process that is killed: run the agent, and never get to the end of it."""
    # This one flushes at a run's end only, so that all it has done is in the buffer alone.
    with TellingSaver.from_conn_string(postgres_uri, redis_url=redis_url, triggers={"run_end"}) as saver:
        agent = build_agent(saver, seconds_per_call=0.3)
        for step in agent.stream(ask(QUESTION), CONFIG, stream_mode="updates"):
            for result in tool_results(step):
                tell(f"result {result}")


def tell(line: str) -> None:
    """Write a whole line at once: the saver is called from a thread, while the run streams from another."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def tool_results(step: dict[str, Any]) -> list[str]:
    """Return what the tool answered in a step."""
    return [str(message.content) for message in step.get("tools", {}).get("messages", ())]


def main() -> None:
    """Run the example."""
    with embedded.servers() as servers:
        with PostgresSaver.from_conn_string(servers.postgres_uri) as stock:
            stock.setup()
        with BufferedPostgresSaver.from_conn_string(servers.postgres_uri, redis_url=servers.redis_url) as saver:
            saver.setup()

        acknowledged, before = run_and_kill(servers.postgres_uri, servers.redis_url)
        print(f"acknowledged before the crash: {len(acknowledged)} checkpoints")
        with PostgresSaver.from_conn_string(servers.postgres_uri) as stock:
            print(f"of these in Postgres: {len(in_postgres(stock) & acknowledged)}")

        print("\nA new saver starts on the same buffer:")
        found = threading.Event()

        def on_event(event: CheckpointEvent) -> None:
            if event.name == "recovery.found":
                print(f"   {event.message}")
                found.set()

        with BufferedPostgresSaver.from_conn_string(servers.postgres_uri, redis_url=servers.redis_url) as saver:
            saver.hooks.add(on_event)
            saver.setup()
            if not found.wait(30):
                raise TimeoutError("the buffer was not found")
            with PostgresSaver.from_conn_string(servers.postgres_uri) as stock:
                print(f"lost: {len(acknowledged - in_postgres(stock))}")

            print("\nThe thread is resumed where it was:")
            after = []
            # No input: the run goes on from its last checkpoint.
            for step in build_agent(saver).stream(None, CONFIG, stream_mode="updates"):
                after += tool_results(step)
            for result in after:
                print(f"   {result}")
            final = build_agent(saver).get_state(CONFIG).values["messages"][-1].content
            print(f"\nthe agent's answer: {final}")
            # The last call before the crash may have been in flight.
            print(f"calls of the tool: {len(before)} before, {len(after)} after; {len(set(after) & set(before))} again")


def run_and_kill(postgres_uri: str, redis_url: str) -> tuple[set[str], list[str]]:
    """Run `doomed` in a process of its own and kill it; return what it had acknowledged and done."""
    acknowledged, results = set(), []
    command = [sys.executable, __file__, "--doomed", postgres_uri, redis_url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        print("A process runs the agent:")
        for line in process.stdout:
            kind, _, rest = line.strip().partition(" ")
            if kind == "acknowledged":
                acknowledged.add(rest)
                if len(results) == CALLS_BEFORE_THE_CRASH:
                    process.kill()
                    print("   *** the process is killed (SIGKILL)")
                    break
            else:
                results.append(rest)
                print(f"   {rest}")
        # Acknowledged between the last line read and the signal.
        acknowledged |= {line.split()[1] for line in process.stdout if line.startswith("acknowledged ")}
    return acknowledged, results


def in_postgres(stock: PostgresSaver) -> set[str]:
    """Return the ids of the thread's checkpoints."""
    return {found.checkpoint["id"] for found in stock.list(CONFIG)}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--doomed"]:
        doomed(*sys.argv[2:4])
    else:
        main()
