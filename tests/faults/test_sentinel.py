"""A master that sentinels watch, TLS, and users with few rights."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from uuid import uuid4

import clusters
import psycopg
import pytest
import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel
from helpers import await_until, wait_until
from load import Load, steps

from checkpointer import BufferedPostgresSaver, BufferUnavailableError, CheckpointEvent, ConfigurationError
from checkpointer.buffer import scripts
from checkpointer.buffer.places import place_of_url

if TYPE_CHECKING:
    from collections.abc import Iterator

    from clusters import Node


@pytest.fixture
def make(postgres_uri: str) -> Iterator[Any]:
    savers = []

    def _make(redis_url: Any, **options: Any) -> Any:
        options = {"hooks": (), "close_timeout": 5.0, "redis_timeout": 1.0, **options}
        saver: Any = BufferedPostgresSaver(postgres_uri, redis_url, **options)
        saver.events = []
        saver.hooks.add(saver.events.append)
        savers.append(saver)
        return saver

    yield _make
    for saver in savers:
        saver.close()


def named(saver: Any, name: str) -> list[Any]:
    return [event for event in saver.events if event.name == name]


# -- sentinels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["valkey", "redis"])
async def test_puts_go_around_while_the_sentinels_fail_over_and_are_back_in_the_buffer_afterwards(
    engine: str, make: Any, postgres_uri: str
) -> None:
    with clusters.fleet(engine) as servers:
        master = servers.node("master")
        replica = servers.node("replica", start=False)
        replica.arguments += ["--replicaof", f"127.0.0.1 {master.port}"]
        replica.start()
        watchers = clusters.sentinels(servers, master)
        saver = make(clusters.sentinel_url(watchers), flush_age=0.3)
        saver.setup()
        with Load(saver, ["a", "b"]) as before:
            wait_until(lambda: before.count() > 50)
        with Load(saver, ["c", "d", "e", "f"]) as load:
            wait_until(lambda: load.count() > 50)
            # Writes at rest for a moment, so that what was acknowledged is known to be replicated.
            with master.client() as client:
                client.execute_command("CLIENT PAUSE", 60_000, "WRITE")
            await await_until(lambda: clusters.replicated(master, replica))
            master.kill()
            await await_until(lambda: clusters.info(replica, "replication").get("role") == "master", timeout=30)
            count = load.count()
            await await_until(lambda: load.count() > count + 100, timeout=30)
            await await_until(lambda: named(saver, "backend.up"), timeout=30)
        assert not load.failures
        assert await await_until(saver.aflush, timeout=30)
        assert before.missing(postgres_uri) == load.missing(postgres_uri) == []
        assert named(saver, "put.around")
        put = next(steps("later"))
        await saver.aput(*put)
        with replica.client() as client:
            assert client.exists(saver._core.commands.layout.thread("later").dirty), "back in the buffer"
        await saver.aclose()


@pytest.fixture(scope="module")
def watched() -> Iterator[list[Node]]:
    with clusters.fleet("valkey") as servers:
        master = servers.node("master")
        replica = servers.node("replica", start=False)
        replica.arguments += ["--replicaof", f"127.0.0.1 {master.port}"]
        replica.start()
        yield clusters.sentinels(servers, master, count=1)


@pytest.mark.parametrize("given", ["sync", "async"])
async def test_a_sentinel_client_of_the_user_is_enough_for_both_worlds(
    watched: list[Node], make: Any, prefix: str, given: str
) -> None:
    module: Any = redis.sentinel if given == "sync" else redis.asyncio.sentinel
    client = module.Sentinel([("127.0.0.1", watched[0].port)]).master_for(clusters.SERVICE)
    saver = make(client, prefix=prefix, triggers=frozenset())
    saver.setup()
    saver.put(*next(steps("a")))
    await saver.aput(*next(steps("b")))
    assert (await saver.aflush()).checkpoints == 2
    await saver.aclose()
    await client.aclose() if given == "async" else client.close()


def test_the_url_of_a_sentinel_as_a_single_server_is_refused_at_setup(watched: list[Node], make: Any) -> None:
    saver = make(f"redis://127.0.0.1:{watched[0].port}", triggers=frozenset())
    with pytest.raises(Exception, match=r"sentinel"):
        saver.setup()


# -- TLS and users -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ca.crt, and server.crt and server.key for 127.0.0.1."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    new = ("req", "-newkey", "rsa:2048", "-nodes", "-days", "2")
    # From Python 3.13 on, certificates are checked strictly: an authority says what its key is for.
    usage = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
    openssl(*new, "-x509", *usage, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=test-ca")
    openssl(*new, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=localhost")
    (folder / "names").write_text(
        "subjectAltName=IP:127.0.0.1,DNS:localhost\n"
        "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\nbasicConstraints=CA:FALSE\n"
    )
    sign = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names", "-days", "2")
    openssl("x509", "-req", "-in", "server.csr", *sign, "-out", "server.crt")
    return folder


@pytest.fixture(scope="module")
def secure(certificates: Path) -> Iterator[Node]:
    """A Redis that speaks TLS only."""
    with clusters.fleet("redis") as servers:
        tls = {"ssl": True, "ssl_ca_certs": str(certificates / "ca.crt")}
        node = servers.node("secure", start=False, **tls)
        node.arguments = [
            *("--bind", "127.0.0.1", "--protected-mode", "no", "--port", "0", "--tls-port", "PORT", "--dir", "."),
            *("--tls-cert-file", f"{certificates}/server.crt", "--tls-key-file", f"{certificates}/server.key"),
            *("--tls-ca-cert-file", f"{certificates}/ca.crt", "--tls-auth-clients", "no"),
            *("--save", "", "--appendonly", "yes"),
        ]
        node.start()
        yield node


def documented_rights(prefix: str, password: str) -> list[str]:
    """Return the rules of the ACL line in docs/scaling.md, for a prefix and a password."""
    text = Path("docs/scaling.md").read_text()
    (line,) = re.findall(r"^ACL SETUSER checkpointer (.*?)^```", text, re.MULTILINE | re.DOTALL)
    rules = line.replace("\\\n", " ").replace("~checkpointer:*", f"~{prefix}:*").replace(">PASSWORD", f">{password}")
    return rules.split()


def test_every_command_of_every_script_is_among_the_documented_rights() -> None:
    sources = [found.source for found in vars(scripts).values() if isinstance(found, scripts.Script)]
    used = {command.lower() for source in sources for command in re.findall(r"call\('([A-Z]+)'", source)}
    assert {f"+{command}" for command in used} <= set(documented_rights("p", "pw"))


async def use_everything(saver: Any) -> None:
    """Call all that the saver does, in both worlds; a refusal would show as an event or as an error."""
    puts = steps("a")
    first = next(puts)
    for _ in range(3):
        saved = saver.put(*next(puts))
    saver.put_writes(saved, [("x", 1)], "task")
    saver.put_writes(saved, [("__interrupt__", 1)], "task")
    await saver.aput(*next(steps("b")))
    assert saver.get_tuple(first[0]) is not None
    assert await saver.aflush()
    saver.put(*next(puts))
    assert saver.flush()
    assert await saver.aget_tuple(first[0]) is not None
    saver.copy_thread("a", "copy")
    saver.prune(["a"])
    saver.delete_for_runs(["no-such-run"])
    saver.delete_thread("b")
    assert len([found async for found in saver.alist(None)]) > 1
    saver.hooks.emit(
        CheckpointEvent(
            name="a.trouble",
            error_type="checkpoint_buffer_error",
            severity="warning",
            message="Something that the user should know.",
            thread_id="a",
            user_notice=True,
        )
    )
    assert saver.hooks.flush(10)


async def test_tls_and_a_user_with_the_documented_rights_are_enough_for_everything(
    secure: Node, certificates: Path, make: Any, postgres_uri: str, own_prefix: str
) -> None:
    with secure.client() as admin:
        admin.execute_command("ACL SETUSER", "limited", *documented_rights(own_prefix, "s3cret/@:"))
        admin.execute_command("ACL LOG", "RESET")
        login = f"limited:{quote('s3cret/@:', safe='')}"
        url = f"rediss://{login}@127.0.0.1:{secure.port}/0?ssl_ca_certs={certificates}/ca.crt"
        saver = make(url, prefix=own_prefix, hooks=("thread_log", "run_events", "system_errors"), triggers=frozenset())
        saver.setup()
        await use_everything(saver)
        assert observed_outbox(saver, postgres_uri)
        refused = [entry["object"] for entry in admin.acl_log()]
    # redis-py tells the server its name, and takes a refusal in its stride.
    assert set(refused) <= {"client|setinfo", b"client|setinfo"}
    assert [event.name for event in saver.events] == ["a.trouble"]
    await saver.aclose()


def observed_outbox(saver: Any, postgres_uri: str) -> bool:
    """Let an error row take the way over Redis, as while Postgres is away, and wait until it has arrived."""
    with psycopg.connect(postgres_uri, autocommit=True) as conn:
        conn.execute("ALTER TABLE system_errors RENAME TO away")
        saver.hooks.emit(
            CheckpointEvent(name="b.trouble", error_type="checkpoint_buffer_error", severity="error", message="b")
        )
        assert saver.hooks.flush(10)
        conn.execute("ALTER TABLE away RENAME TO system_errors")
        query = "SELECT delivery FROM system_errors WHERE error_message = 'b'"
        (row,) = wait_until(lambda: conn.execute(query).fetchall(), timeout=30)
    saver.events[:] = [event for event in saver.events if event.name != "b.trouble"]
    return row == ("redis",)


@pytest.fixture
def own_prefix() -> str:
    return f"t{uuid4().hex[:12]}"


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_a_wrong_password_is_named_at_setup(
    secure: Node, certificates: Path, make: Any, asynchronous: bool
) -> None:
    url = f"rediss://limited:wrong@127.0.0.1:{secure.port}?ssl_ca_certs={certificates}/ca.crt"
    saver = make(url)
    with pytest.raises(BufferUnavailableError, match=r"refuses the login \(.*\): check user and password") as raised:
        await saver.asetup() if asynchronous else saver.setup()
    assert "wrong" not in str(raised.value)
    await saver.aclose()


def test_a_certificate_that_nobody_signed_is_refused(secure: Node, make: Any) -> None:
    saver = make(f"rediss://127.0.0.1:{secure.port}")
    with pytest.raises(BufferUnavailableError) as raised:
        saver.setup()
    assert "certificate verify failed" in str(raised.value.__cause__)


def test_a_missing_right_lets_puts_go_around_and_the_event_says_so(
    secure: Node, certificates: Path, make: Any, own_prefix: str
) -> None:
    rules = [rule for rule in documented_rights(own_prefix, "pw") if rule != "+hset"]
    with secure.client() as admin:
        admin.execute_command("ACL SETUSER", "poor", *rules)
    url = f"rediss://poor:pw@127.0.0.1:{secure.port}?ssl_ca_certs={certificates}/ca.crt"
    saver = make(url, prefix=own_prefix, triggers=frozenset())
    saver.setup()
    saver.put(*next(steps("a")))
    (around,) = wait_until(lambda: named(saver, "put.around"))
    assert "can't run this command" in around.error.message


# -- URLs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("redis+cluster://", "a host is missing"),
        ("redis+cluster://h:1,", "a host is missing"),
        ("redis+cluster://h:1/3", "a cluster has no databases"),
        ("redis+cluster://h:port", "port"),
        ("redis+cluster://h?no_such_option=1", "no_such_option"),
        ("redis+sentinel://h:26379", "the service's name is missing"),
        ("redis+sentinel://h:26379/s/x", "invalid literal"),
        ("redis+sentinel://h:26379/s?no_such_option=1", "no_such_option"),
        ("redis+other://h", "unknown scheme"),
        ("valkey+cluster://h", "unknown scheme"),
        ("redis://h?no_such_option=1", "no_such_option"),
        ("http://h", "scheme"),
    ],
)
def test_a_url_that_cannot_work_is_refused_and_the_forms_are_named(url: str, why: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(why)) as raised:
        BufferedPostgresSaver.from_conn_string("postgresql://h/d", redis_url=url)
    for form in ("redis://", "redis+cluster://", "redis+sentinel://"):
        assert form in str(raised.value)


def test_a_url_gives_all_hosts_the_login_the_service_and_the_settings() -> None:
    url = (
        "rediss+sentinel://u:p%40@h1:1,h2,[::1]:3/the-service/4?ssl_cert_reqs=none&sentinel_password=q&socket_timeout=7"
    )
    place = place_of_url(url, 1.0)
    pool: Any = place.client().connection_pool
    watchers = [watcher.connection_pool.connection_kwargs for watcher in pool.sentinel_manager.sentinels]
    assert [(w["host"], w["port"]) for w in watchers] == [("h1", 1), ("h2", 26379), ("::1", 3)]
    assert pool.service_name == "the-service"
    found = pool.connection_kwargs
    assert (found["username"], found["password"], found["db"], found["socket_timeout"]) == ("u", "p@", 4, 7.0)
    assert pool.connection_class is redis.sentinel.SentinelManagedSSLConnection
    assert watchers[0]["password"] == "q"
