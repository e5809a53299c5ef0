"""A slow network: a process between clients and servers that delays what passes, and counts round trips.

Run as `python -m benchmarks.network HOST:PORT ...`, it prints the local port for each of the addresses, and then obeys
lines on standard input: `delay SECONDS` (answers `ok`) and `turns` (answers how often so far each conversation has
turned from the server to the client and back). It ends with its input.

The delay is that of a round trip: each piece waits half of it on each way, from the moment it came, however much
comes behind it, as on a long line. Python's usual event loop rounds waits up to whole milliseconds; this one, which
waits with `select`, does not. Not here: failures of a network, which the tests have a proxy for.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import selectors
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class _Line:
    """The way to one server."""

    def __init__(self) -> None:
        self.delay = 0.0
        self.turns = 0

    async def connect(self, host: str, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(host, port)
        spoke = {"server": True}
        await asyncio.gather(
            self._pass_on(reader, server_writer, spoke, from_server=False),
            self._pass_on(server_reader, writer, spoke, from_server=True),
        )

    async def _pass_on(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, spoke: dict[str, bool], *, from_server: bool
    ) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 20):
                if not from_server and spoke["server"]:
                    self.turns += 1
                spoke["server"] = from_server
                if self.delay:
                    loop.call_at(loop.time() + self.delay / 2, sink.write, data)
                else:
                    sink.write(data)
        loop.call_at(loop.time() + self.delay / 2, sink.close)


async def _serve(addresses: Sequence[tuple[str, int]]) -> None:
    lines = []
    ports = []
    for host, port in addresses:
        line = _Line()

        server = await asyncio.start_server(functools.partial(line.connect, host, port), "127.0.0.1", 0)
        ports.append(server.sockets[0].getsockname()[1])
        lines.append(line)
    print(*ports, flush=True)
    while words := (await asyncio.to_thread(sys.stdin.readline)).split():
        if words[0] == "delay":
            for line in lines:
                line.delay = float(words[1])
            print("ok", flush=True)
        else:
            print(*(line.turns for line in lines), flush=True)


class Network:
    """The process, seen from the one that measures.

    Attributes:
        ports: The local port for each address.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.ports = [int(word) for word in self._answer()]

    def delay(self, seconds: float) -> None:
        """Have each round trip last this much longer from now on."""
        self._say(f"delay {seconds}")
        self._answer()

    def turns(self) -> list[int]:
        """Return the round trips so far, for each address."""
        self._say("turns")
        return [int(word) for word in self._answer()]

    def _say(self, line: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _answer(self) -> list[str]:
        assert self._process.stdout
        if not (words := self._process.stdout.readline().split()):
            raise RuntimeError("the network's process has ended")
        return words


@contextlib.contextmanager
def network(*addresses: tuple[str, int]) -> Iterator[Network]:
    """Put a network between this process and some servers."""
    argv = [sys.executable, "-m", "benchmarks.network", *(f"{host}:{port}" for host, port in addresses)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Network(process)
        finally:
            process.kill()


def main() -> None:
    """Run the process."""
    addresses = [(host, int(port)) for host, _, port in (word.rpartition(":") for word in sys.argv[1:])]
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(_serve(addresses))


if __name__ == "__main__":
    main()
