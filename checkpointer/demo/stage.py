"""What the scenes play on: servers, savers, agents, users who watch, and the console; and how a scene tells of them.

Not here: what happens in a scene (`scenes.py`), and how a line is shown (`narration.py`).
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

import psycopg

from checkpointer.demo.acknowledged import Acknowledged, NotingSaver
from checkpointer.demo.agents import Trip, build_travel_desk, config_of
from checkpointer.demo.narration import Line
from checkpointer.options import BufferOptions
from checkpointer.whereabouts import Buffer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from checkpointer.demo.audience import Audience
    from checkpointer.demo.ending import Ending
    from checkpointer.demo.narration import Kind, Tell
    from checkpointer.demo.serving import Console
    from checkpointer.embedded import Servers
    from checkpointer.events import CheckpointEvent

__all__ = ["Gate", "NotSoError", "Stage"]

_FIELDS = ("id", "error_type", "severity", "thread_id", "error_message", "occurrences", "outcome", "resolved_by")


class NotSoError(Exception):
    """What the demo claims is not so."""


class Gate:
    """Stops each run at its second call of a tool, so that something can happen in the middle of all of them.

    Args:
        ending: Lets everybody go on if somebody asks for the end.

    Attributes:
        stopped: How many runs wait.
    """

    def __init__(self, ending: Ending) -> None:
        self.stopped = 0
        self._ending = ending
        self._known: set[str] = set()
        self._lock = threading.Lock()
        self._open = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.open()

    def pass_through(self, thread_id: str) -> None:
        """Return at once the first time, and then when the gate is open."""
        with self._lock:
            if thread_id not in self._known:
                self._known.add(thread_id)
                return
            self.stopped += 1
        while not self._ending.asked and not self._open.wait(0.1):
            pass

    def open(self) -> None:
        """Let everybody go on, from now on."""
        self._open.set()


class Stage:
    """What the scenes play on.

    Args:
        servers: The private servers, which scenes may kill.
        console: The console on them.
        audience: Watches for one user.
        tell: Takes what is told.
        ending: When to end.
        pace: Seconds between scenes; within them things take a small part of it.
        folder: For files, gone with the servers.

    Attributes:
        acknowledged: All that savers have acknowledged.
        expected: For each thread what its state has to be.
    """

    def __init__(
        self,
        servers: Servers,
        console: Console,
        audience: Audience,
        tell: Tell,
        ending: Ending,
        pace: float,
        folder: Path,
    ) -> None:
        self.servers = servers
        self.console = console
        self.ending = ending
        self.folder = folder
        self.acknowledged = Acknowledged()
        self.expected: dict[str, dict[str, Any]] = {}
        self._audience = audience
        self._tell = tell
        self._pace = pace
        self._lock = threading.Lock()
        self._events: Counter[str] = Counter()
        self._shown: set[str] = set()

    # -- telling -------------------------------------------------------------------------------------------------

    def tell(self, kind: Kind, text: str) -> None:
        """Tell something."""
        self._tell(Line(kind, text))

    def prove(self, claim: str, is_true: object) -> None:
        """Tell that something is so.

        Raises:
            NotSoError: It is not.
        """
        if not is_true:
            raise NotSoError(f"This is not so: {claim}")
        self.tell("proved", claim)

    def look(self, path: str, what: str) -> None:
        """Say what to look at in the console."""
        self.tell("look", f"{what}: {self.console.page(path)}")

    def pause(self) -> None:
        """Leave time to look.

        Raises:
            EndedError: Somebody has asked for the end.
        """
        self.ending.sleep(self._pace)
        self.ending.check()

    def ask(self, path: str) -> Any:
        """Show what the HTTP interface answers, shortened, and return the whole."""
        _, answer = self.console.get(path)
        self.tell("shell", f'curl -s -H "Authorization: Bearer $TOKEN" "$URL{path}"')
        self.tell("output", shortened(answer))
        return answer

    def on_event(self, event: CheckpointEvent) -> None:
        """Tell of the first event of each name in a scene; the others are counted."""
        with self._lock:
            self._events[event.name] += 1
            first = self._events[event.name] == 1
        if first:
            about = f" [{event.thread_id}]" if event.thread_id else ""
            self.tell("event", f"{event.severity} {event.name}{about}: {event.message}")

    def seen(self, name: str) -> int:
        """Return how many events with a name there were in this scene."""
        with self._lock:
            return self._events[name]

    def count_events(self) -> None:
        """Tell how many more events there were, and begin to count anew."""
        with self._lock:
            more = {name: count - 1 for name, count in self._events.items() if count > 1}
            self._events.clear()
        if more:
            self.tell("event", "and like these: " + ", ".join(f"{count} more {name}" for name, count in more.items()))

    def watch(self, thread_id: str) -> None:
        """Tell from now on what the user of a thread sees, and of nobody else."""
        self._shown.clear()
        self._audience.watch(thread_id, self._show)

    def was_shown(self, outcome: str) -> bool:
        """Tell whether the user who is watched has seen something with this outcome."""
        return outcome in self._shown

    def _show(self, event: dict[str, Any]) -> None:
        self.tell("screen", f"[{event.get('thread_id')}] {event.get('severity')}: {event.get('message')}")
        self._shown.add(str(event.get("outcome")))

    # -- acting --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def saver(self, **options: Any) -> Iterator[NotingSaver]:
        """Open a saver as an application does, whose events are told."""
        options = {"close_timeout": 2.0, **options}
        with NotingSaver(self.servers.postgres_uri, self.servers.redis_url, self.acknowledged, **options) as opened:
            assert isinstance(opened, NotingSaver)
            opened.hooks.add(self.on_event, name="demo")
            yield opened
            opened.hooks.flush()

    @contextlib.contextmanager
    def postgres(self) -> Iterator[psycopg.Connection[Any]]:
        """Connect to Postgres as somebody else does."""
        with psycopg.connect(self.servers.postgres_uri, autocommit=True) as conn:
            yield conn

    @contextlib.contextmanager
    def runs(self, saver: NotingSaver, trips: Sequence[Trip], gate: Gate | None = None) -> Iterator[list[Future[str]]]:
        """Run the travel desk for each trip, all at a time; the block ends when all runs have.

        Args:
            saver: The saver.
            trips: The trips, each on a thread of its own.
            gate: Where each run stops in its middle.

        Yields:
            The agents' answers to be.
        """

        def run(trip: Trip) -> str:
            def wait() -> None:
                self.ending.sleep(self._pace / 20)
                if gate is not None:
                    gate.pass_through(trip.thread_id)

            desk = build_travel_desk(saver, wait)
            state = desk.invoke(trip.input(), config_of(trip.thread_id))
            return str(state["messages"][-1].content)

        for trip in trips:
            said = self.expected.setdefault(trip.thread_id, {"messages": []})
            said["messages"] += trip.transcript
        with ThreadPoolExecutor(len(trips)) as pool:
            yield [pool.submit(run, trip) for trip in trips]

    def waiting_threads(self) -> int | None:
        """Return of how many threads the buffer holds something; None if it cannot be asked."""
        options = BufferOptions()
        with Buffer(self.servers.redis_url, options.key_prefix, options.partitions) as buffer:
            return buffer.waiting_threads()

    def answered(self, trips: Sequence[Trip], answers: Sequence[Future[str]]) -> bool:
        """Wait for runs to end, and tell whether each gave the answer that it should."""
        found = [answer.result(60) for answer in answers]
        self.ending.check()
        return found == [trip.answer for trip in trips]


def shortened(answer: Any) -> str:
    """Return an answer of the HTTP interface as JSON, errors with some of their fields only."""
    if not isinstance(answer, dict) or not isinstance(answer.get("errors"), list):
        return json.dumps(answer)
    errors = [{name: error[name] for name in _FIELDS if error.get(name) is not None} for error in answer["errors"]]
    listed = ",\n ".join(json.dumps(error)[:-1] + ", ...}" for error in errors)
    return f'{{"status": "{answer["status"]}", "count": {answer["count"]}, "errors": [\n {listed}], ...}}'
