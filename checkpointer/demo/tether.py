"""What a worker process of the demo runs: `checkpointer worker`, as long as its standard input is open.

The demo holds the other end, so that no worker outlives it, however it dies.
"""

from __future__ import annotations

import os
import threading

from checkpointer import cli

__all__ = ["main"]


def main() -> None:
    """Run the command that `sys.argv` names, and exit."""
    threading.Thread(target=_end_with_the_demo, daemon=True).start()
    cli.main()


def _end_with_the_demo() -> None:
    # Not by way of sys.stdin, whose lock the interpreter would miss at its end.
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
