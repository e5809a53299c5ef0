"""Works on a case until a person has to approve something, asks, and goes on; also days later, in another process.

Run it: python examples/supervisor/run.py   (README.md has what to try)
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langchain_core.messages import HumanMessage
from langgraph.types import Command
from team import build_team

from checkpointer import BufferedPostgresSaver, embedded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from langchain_core.runnables import RunnableConfig
    from langgraph.types import StateSnapshot
    from team import Approval, Graph

REQUEST = "Order 42: the parcel never arrived. Sort it out."


@contextmanager
def open_saver(folder: Path) -> Iterator[BufferedPostgresSaver]:
    """Open the saver, on the servers that POSTGRES_URI and REDIS_URL name, or on private ones that keep their data."""
    postgres_uri, redis_url = os.environ.get("POSTGRES_URI"), os.environ.get("REDIS_URL")
    if postgres_uri and redis_url:
        with BufferedPostgresSaver.from_conn_string(postgres_uri, redis_url=redis_url) as saver:
            yield saver
    else:
        with (
            embedded.servers(folder) as servers,
            BufferedPostgresSaver.from_conn_string(servers.postgres_uri, redis_url=servers.redis_url) as saver,
        ):
            yield saver


def work(team: Graph, given: Any, config: RunnableConfig) -> StateSnapshot:
    """Run until the case is closed or a person is needed, and print who says what."""
    for namespace, update in team.stream(given, config, stream_mode="updates", subgraphs=True):
        for node, change in update.items():
            # What happens inside of a graph of the team was printed when it happened, and comes again at its end.
            if namespace or node == "supervisor":
                for message in change.get("messages", ()) if node != "__interrupt__" else ():
                    print(f"   {message.name}: {message.text}")
    return team.get_state(config)


def ask(approval: Approval, always: bool | None) -> bool | None:
    """Ask the person at the terminal; None if nobody is there to answer."""
    print(f"   {approval['who']} wants to {approval['wants_to']}")
    if always is not None:
        print(f"   {'approved' if always else 'refused'}, as the command says")
        return always
    if not sys.stdin.isatty():
        return None
    answer = ""
    while answer not in ("y", "n", "q"):
        answer = (input("   Approve? [y]es, [n]o, [q]uit and decide later: ").strip().lower() or " ")[0]
    return None if answer == "q" else answer == "y"


def main() -> None:
    """Go on with a case, or begin it."""
    parser = argparse.ArgumentParser(description="A supervisor, two workers, and you.")
    parser.add_argument("--case", default="case-1", help="the name of the case: its thread")
    parser.add_argument("--yes", dest="always", action="store_true", default=None, help="approve everything")
    parser.add_argument("--no", dest="always", action="store_false", help="refuse everything")
    folder = Path(tempfile.gettempdir(), f"checkpointer-supervisor-{os.getuid()}")
    parser.add_argument("--data", type=Path, default=folder, help=f"where the private servers keep it ({folder})")
    given = parser.parse_args()
    config: RunnableConfig = {"configurable": {"thread_id": given.case}}

    with open_saver(given.data) as saver:
        saver.setup()
        team = build_team(saver)
        state = team.get_state(config)
        if not state.values:
            print(f"{given.case} begins.")
            state = work(team, {"messages": [HumanMessage(REQUEST)], "order": "42"}, config)
        else:
            print(f"{given.case} goes on.")
            if state.next and not state.interrupts:
                # The process was ended while somebody was at work: from the last checkpoint on it is done again.
                state = work(team, None, config)
        while state.interrupts:
            decision = ask(state.interrupts[0].value, given.always)
            if decision is None:
                print(f"{given.case} waits for you: run this again, with --yes or --no or at a terminal.")
                return
            state = work(team, Command(resume=decision), config)
        print(f"{given.case}: {state.values['messages'][-1].text}")


if __name__ == "__main__":
    main()
