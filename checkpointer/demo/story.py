"""The demo from beginning to end: servers, console, the scenes, the proof, and everything away again.

Not here: what happens in a scene (`scenes.py`).
"""

from __future__ import annotations

import contextlib
import os
import threading
import webbrowser
from typing import TYPE_CHECKING

from checkpointer import embedded
from checkpointer.demo.audience import Audience
from checkpointer.demo.ending import EndedError
from checkpointer.demo.narration import Line
from checkpointer.demo.proof import prove
from checkpointer.demo.scenes import SCENES
from checkpointer.demo.serving import listening, serving
from checkpointer.demo.stage import NotSoError, Stage
from checkpointer.errors import CheckpointerError
from checkpointer.saver import BufferedPostgresSaver

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from checkpointer.demo.ending import Ending
    from checkpointer.demo.narration import Tell
    from checkpointer.demo.scenes import Scene
    from checkpointer.demo.serving import Console
    from checkpointer.embedded import Servers

__all__ = ["private_environment", "tell_story"]

# The addresses and settings of somebody's real servers, and where runs would be traced over the network.
_FOREIGN = ("PG", "POSTGRES_URI", "REDIS_URL", "CHECKPOINTER_", "LANGCHAIN_", "LANGSMITH_", "SENTRY_", "OTEL_")


def tell_story(
    tell: Tell,
    ending: Ending,
    *,
    pace: float,
    port: int = 0,
    open_browser: bool = False,
    stay: bool = True,
    scenes: Sequence[Scene] = SCENES,
) -> bool:
    """Tell the story.

    Args:
        tell: Takes what is told.
        ending: Ends it early.
        pace: Seconds to look between scenes.
        port: Of the console; 0 for any free one.
        open_browser: Open the console in a browser.
        stay: Keep the console open at the end, until somebody asks for the end.
        scenes: What is played.

    Returns:
        Whether everything that was claimed was so, as far as it was told.

    Raises:
        ConfigurationError: Something is not installed, or the port is taken.
        CheckpointerError: A server did not start.
    """
    tell(Line("say", "Starting a private Postgres, a private Valkey and the console. They end with this command."))
    well = True
    try:
        with (
            # Taken first: else a port that is taken would be found out late.
            listening(port) as listener,
            embedded.servers() as servers,
            private_environment(servers) as folder,
            _prepared(servers, tell, ending, pace, listener, folder) as stage,
        ):
            _introduce(stage)
            if open_browser:
                _open(stage.console)
            stage.pause()
            well = _play(stage, scenes)
            if stay:
                _stay(stage)
    except EndedError:
        pass
    except CheckpointerError:
        # Ctrl-C in a terminal hits what is just being started as well.
        if not ending.asked:
            raise
    tell(Line("say", "The servers have ended, and their folder is removed."))
    return well


@contextlib.contextmanager
def private_environment(servers: Servers) -> Iterator[Path]:
    """Keep this process and its children from everything that the environment names, for as long as a block lasts.

    Yields:
        A folder for files, gone with the servers.
    """
    folder = servers.data_dir / "demo"
    folder.mkdir(mode=0o700)
    foreign = {name: value for name, value in os.environ.items() if name.startswith(_FOREIGN)}
    for name in foreign:
        del os.environ[name]
    # Reports that find no server are kept in a file, which is not to be the user's.
    os.environ |= {"CHECKPOINTER_SPOOL_DIR": str(folder / "spool"), "CHECKPOINTER_ENVIRONMENT": "demo"}
    try:
        yield folder
    finally:
        for name in ("CHECKPOINTER_SPOOL_DIR", "CHECKPOINTER_ENVIRONMENT"):
            os.environ.pop(name, None)
        os.environ |= foreign


@contextlib.contextmanager
def _prepared(
    servers: Servers, tell: Tell, ending: Ending, pace: float, listener: socket.socket, folder: Path
) -> Iterator[Stage]:
    """Make the stage, with tables, console and audience."""
    ending.check()
    with BufferedPostgresSaver.from_conn_string(servers.postgres_uri, redis_url=servers.redis_url) as saver:
        saver.setup()
    ending.check()
    with contextlib.ExitStack() as stack:
        console = stack.enter_context(serving(servers, listener))
        audience = stack.enter_context(Audience(servers))
        yield Stage(servers, console, audience, tell, ending, pace, folder)


def _introduce(stage: Stage) -> None:
    console, servers = stage.console, stage.servers
    stage.tell("look", f"the console, signed in: {console.link}")
    stage.tell("say", "For commands in another terminal:")
    stage.tell("shell", f"export URL={console.url} TOKEN={console.token}")
    stage.tell("output", f"export POSTGRES_URI={servers.postgres_uri} REDIS_URL={servers.redis_url}")


def _open(console: Console) -> None:
    # Some browsers only return when they are closed.
    threading.Thread(target=webbrowser.open, args=(console.link,), daemon=True).start()


def _play(stage: Stage, scenes: Sequence[Scene]) -> bool:
    """Play the scenes and then prove the whole; returns whether all was as it should be."""
    try:
        for number, scene in enumerate(scenes, 1):
            stage.tell("title", f"{number}/{len(scenes)} {scene.title}")
            scene.play(stage)
            stage.pause()
        stage.tell("title", "The proof")
        _prove(stage)
    except (NotSoError, TimeoutError) as exc:
        stage.tell("failed", str(exc))
        return False
    return True


def _prove(stage: Stage) -> None:
    servers = stage.servers
    proof = prove(servers.postgres_uri, servers.redis_url, stage.acknowledged, stage.expected)
    stage.tell(
        "say",
        f"Savers have acknowledged {proof.checkpoints} checkpoints and {proof.writes} pending writes of "
        f"{proof.threads} threads.",
    )
    stage.prove(
        f"LangGraph's own PostgresSaver finds all {proof.checkpoints} checkpoints: "
        f"{len(proof.missing_checkpoints)} are missing.",
        not proof.missing_checkpoints,
    )
    stage.prove(
        f"All {proof.writes} pending writes are in Postgres: {len(proof.missing_writes)} are missing.",
        not proof.missing_writes,
    )
    stage.prove(
        f"The last state of each thread is what it should be ({len(stage.expected)} threads, every message compared).",
        not proof.wrong_states,
    )
    stage.prove("Nothing waits in the buffer.", proof.waiting_threads == 0)


def _stay(stage: Stage) -> None:
    stage.tell("say", "The console stays open, with all that has happened:")
    stage.tell("look", stage.console.link)
    stage.tell("say", "Ctrl-C ends the demo and removes everything.")
    while True:
        stage.ending.sleep(3_600)
        stage.ending.check()
