"""The scenes: what goes wrong in each, what is seen of it, and what is then shown to be true.

A scene changes nothing that it does not put right again, so each can be played alone. Not here: what they play on
(`stage.py`), and in which frame they are told (`story.py`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psycopg
from langgraph.checkpoint.postgres import PostgresSaver

from checkpointer.demo import faults
from checkpointer.demo.agents import LONG, Score, Trip, build_scorer, build_travel_desk, config_of
from checkpointer.demo.stage import Gate
from checkpointer.demo.workers import WorkerProcess
from observability import log_system_error_sync

if TYPE_CHECKING:
    from collections.abc import Callable

    from checkpointer.demo.stage import Stage

__all__ = ["SCENES", "Scene"]

_ERRORS = "/admin/system-errors"


@dataclass(frozen=True, slots=True)
class Scene:
    """A part of the story.

    Attributes:
        name: A short name.
        title: What happens.
        play: Does it, and tells of it.
    """

    name: str
    title: str
    play: Callable[[Stage], None]


def calm(stage: Stage) -> None:
    """Agents run, and everything is well."""
    trips = [
        Trip("ann", ("Bergen", "Izmir")),
        Trip("ben", ("Hanoi", "Accra")),
        Trip("chen", ("Cusco",)),
        Trip("dana", ("Tartu", "Bergen", "Accra")),
        Trip("eli", ("Izmir", "Tartu")),
    ]
    stage.tell(
        "say", "Five users ask a travel desk how to get somewhere: five threads at a time, a fake model, one tool."
    )
    with stage.saver() as saver:
        with stage.runs(saver, trips) as answers:
            stage.prove("All five runs have completed with the right answers.", stage.answered(trips, answers))
        told = stage.acknowledged.copy()
        stage.tell(
            "say",
            f"Redis has acknowledged {len(told.checkpoints)} checkpoints and {len(told.writes)} pending writes. A "
            "background thread brings them to Postgres, into LangGraph's own tables.",
        )
        stage.prove("saver.flush() says that all of it is in Postgres.", saver.flush())
    stage.look("/", "how it stands, with nothing wrong yet")
    stage.look("/threads", "the threads; each has its timeline of checkpoints")


def not_a_number(stage: Stage) -> None:
    """A NaN gets into a state."""
    thread = "fay"
    question: Score = {"question": "How good was it?"}
    stage.tell("say", "A node computes the mean of no answers. First with LangGraph's own PostgresSaver:")
    stage.tell("fault", "the state holds NaN and Infinity, which JSON in Postgres does not know")
    with PostgresSaver.from_conn_string(stage.servers.postgres_uri) as stock:
        try:
            build_scorer(stock).invoke(question, config_of("fay-on-stock-saver"))
            refusal = ""
        except psycopg.Error as exc:
            refusal = f"{type(exc).__name__}: {exc.diag.message_primary}"
    stage.prove(f"The run fails ({refusal}).", refusal)
    stage.tell("say", "Now with BufferedPostgresSaver:")
    with stage.saver() as saver:
        build_scorer(saver).invoke(question, config_of(thread))
        expected = {**question, "score": None, "details": {"answers": 0, "mean": None}}
        stage.expected[thread] = expected
        values = build_scorer(saver).get_state(config_of(thread)).values
        stored = f"score={values['score']}, details={values['details']}"
        stage.prove(f"The run completes; stored is {stored}.", values == expected)
        path = f"{_ERRORS}?state=all&error_type=checkpoint_sanitized&limit=1"
        _wait_for_errors(stage, path, "the report of the NaN is there", lambda errors: errors)
    stage.count_events()
    stage.ask(path)
    stage.tell("say", 'It is a warning, with the path of each value. non_finite="keep" stores NaN as it is instead.')
    stage.look("/errors?error_type=checkpoint_sanitized", "the warning; it stays open, for you to resolve")


def postgres_away(stage: Stage) -> None:
    """Postgres is killed in the middle of five runs, and comes back."""
    trips = [
        Trip("ann", ("Accra", "Bergen", "Cusco", "Hanoi")),
        Trip("ben", ("Tartu", "Izmir", "Hanoi")),
        Trip("chen", ("Bergen", "Accra", "Izmir")),
        Trip("dana", ("Cusco", "Hanoi", "Izmir", "Tartu")),
        Trip("eli", ("Accra", "Tartu", "Bergen")),
    ]
    stage.tell("say", "The five go on talking. What ann sees is shown here too.")
    stage.watch("ann")
    with stage.saver() as saver:
        with Gate(stage.ending) as gate, stage.runs(saver, trips, gate) as answers:
            stage.ending.wait_for("all runs are in their middle", lambda: gate.stopped == len(trips))
            stage.servers.postgres.kill()
            stage.tell("fault", "Postgres is killed (SIGKILL) while all five runs are in their middle")
            gate.open()
            stage.prove("All five runs go on and complete without Postgres.", stage.answered(trips, answers))
        stage.ending.wait_for("the flusher reports", lambda: stage.seen("flush.failed") and stage.seen("backend.down"))
        stage.ending.wait_for("ann is told", lambda: stage.was_shown("retrying"))
        report = saver.flush()
        stage.prove(
            f"saver.flush() does not pretend: {report.waiting} records of {len(report.waiting_threads)} threads wait "
            "in the buffer.",
            not report and report.waiting,
        )
        stage.ask("/readyz")
        stage.look("/", "how it stands while Postgres is away")
        stage.pause()
        stage.servers.postgres.start()
        stage.tell("say", "Postgres is started again. Nobody does anything else.")
        stage.ending.wait_for("the flusher finds it", lambda: stage.seen("flush.recovered") and saver.flush())
        stage.prove("Everything that waited is in Postgres.", saver.flush())
        stage.ending.wait_for("ann is told", lambda: stage.was_shown("recovered"))
        path = f"{_ERRORS}?state=all&error_type=checkpoint_flush_error&thread_id=ann"
        _wait_for_errors(
            stage,
            path,
            "the errors have arrived, and are resolved",
            lambda errors: errors and all(error["resolved_at"] for error in errors),
        )
    stage.count_events()
    stage.tell("say", "The errors happened while their table could not be written. They waited in Redis:")
    stage.ask(path)
    stage.look("/errors?state=all", "the outage, resolved by the recovery itself")
    stage.look("/thread?thread=ann", "ann's thread, with the outage between its checkpoints")


def poison(stage: Stage) -> None:
    """Postgres refuses a row for what it holds."""
    trips = [Trip("chen", (LONG, "Tartu")), Trip("dana", ("Izmir",)), Trip("eli", ("Hanoi",))]
    stage.tell("say", "chen asks for a city about which the tool knows 20,000 characters.")
    stage.watch("chen")
    with stage.saver() as saver:
        with stage.postgres() as conn:
            faults.limit_blobs(conn)
        stage.tell("fault", f"somebody adds a CHECK to checkpoint_blobs: at most {faults.LIMIT} bytes")
        with stage.runs(saver, trips) as answers:
            stage.prove("All runs complete.", stage.answered(trips, answers))
        stage.ending.wait_for("the refused row is put aside", lambda: stage.seen("dead_letter.added"))
        stage.ending.wait_for("chen is told", lambda: stage.was_shown("buffered"))
        stage.ending.wait_for("the others are saved", lambda: saver.flush("dana") and saver.flush("eli"))
        stage.prove(
            "The refused row holds up its own thread only: dana and eli are in Postgres.", not saver.flush("chen")
        )
        values = build_travel_desk(saver).get_state(config_of("chen")).values
        stage.prove("chen's conversation can be read, whole.", values["messages"][-1].content == trips[0].answer)
        path = f"{_ERRORS}?state=all&error_type=checkpoint_dead_letter"
        _wait_for_errors(stage, path, "the report of the dead letter is there", lambda errors: errors)
        stage.ask(path)
        stage.look("/dead-letters", "the refused row, and what it holds (it is replayed in a moment)")
        stage.pause()
        with stage.postgres() as conn:
            faults.lift_limit(conn)
        stage.tell(
            "say",
            "The constraint is dropped, and the refused row is replayed, as `checkpointer dead-letters replay --all` "
            "and a button in the console do it.",
        )
        saver.dead_letters.replay(resolved_by="demo")
        stage.ending.wait_for("what waited behind it is saved", saver.flush)
        stage.prove("chen's thread is in Postgres too, with all that came after the refused row.", saver.flush("chen"))
        stage.ending.wait_for("chen is told", lambda: stage.was_shown("recovered"))
    stage.count_events()


def worker_killed(stage: Stage) -> None:
    """A worker is killed in the middle of a flush, and another one takes its work over."""
    trips = [Trip(name, ("Hanoi", "Cusco", "Tartu")) for name in ("ann", "ben", "chen", "dana", "eli")]
    stage.tell("say", "Larger applications leave the flushing to processes of their own: two `checkpointer worker`.")
    with (
        WorkerProcess("worker-1", stage.servers, stage.folder) as first,
        WorkerProcess("worker-2", stage.servers, stage.folder) as second,
        stage.saver(triggers=frozenset()) as saver,
        stage.postgres() as conn,
    ):
        workers = (first, second)
        stage.ending.wait_for("both workers flush", lambda: all(one.is_flushing() for one in workers))
        stage.tell("say", f"They run as {first.name} (process {first.pid}) and {second.name} (process {second.pid}).")
        with faults.held_inserts(stage.servers.postgres_uri):
            with stage.runs(saver, trips) as answers:
                completed = stage.answered(trips, answers)
            held: list[WorkerProcess] = []

            def find() -> bool:
                held[:] = [one for one in workers if faults.is_held(conn, one.name)]
                return bool(held)

            stage.ending.wait_for("a worker is in the middle of a flush", find)
            dead = held[0]
            dead.kill()
            killed_at = time.monotonic()
        stage.tell("fault", f"{dead.name} is killed (SIGKILL) in the middle of a flush, its transaction open")
        stage.prove("All five runs have completed meanwhile.", completed)
        left = second if dead is first else first
        log_system_error_sync(
            error_type="worker_killed",
            severity="warning",
            error_message=f"{dead.name} (process {dead.pid}) was killed by SIGKILL.",
            error_context={"process": dead.pid, "signal": "SIGKILL"},
        )
        stage.ending.wait_for("the other worker has saved everything", lambda: stage.waiting_threads() == 0)
        seconds = time.monotonic() - killed_at
        stage.prove(f"{left.name} has saved everything {seconds:.1f} s later, and nobody had to do anything.", True)
        path = f"{_ERRORS}?state=all&error_type=worker_killed"
        _wait_for_errors(stage, path, "the report of the killed worker is there", lambda errors: errors)
        stage.tell("say", "No checkpoint is in trouble. Whoever runs the workers can report it, by log_system_error:")
        stage.ask(path)
        stage.prove(f"{left.name} is told to end (SIGTERM), drains and exits with 0.", left.drain() == 0)
    stage.count_events()


SCENES = (
    Scene("calm", "Five users talk to an agent", calm),
    Scene("nan", "A NaN gets into a state", not_a_number),
    Scene("postgres", "Postgres is killed, and comes back", postgres_away),
    Scene("poison", "Postgres refuses a row", poison),
    Scene("worker", "A worker is killed in the middle of a flush", worker_killed),
)
"""The story, in order."""


def _wait_for_errors(stage: Stage, path: str, what: str, is_it: Callable[[list[dict[str, Any]]], object]) -> None:
    """Wait until the HTTP interface lists what is expected."""

    def found() -> object:
        status, answer = stage.console.get(path)
        return status == 200 and is_it(answer["errors"])

    stage.ending.wait_for(what, found)
