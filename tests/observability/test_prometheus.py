"""A saver's metrics in a registry of the application's."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

import pytest
from helpers import put_one, wait_until
from prometheus_client import REGISTRY, CollectorRegistry, Counter, generate_latest
from savers import NOTHING, put

from checkpointer import BufferedPostgresSaver, ConfigurationError
from checkpointer.hooks import load_hook
from checkpointer.metrics import METRICS, PREFIX
from checkpointer.worker import Worker
from observability.prometheus import PrometheusMetrics

if TYPE_CHECKING:
    from collections.abc import Callable

    from checkpointer.embedded import Servers
    from checkpointer.hooks import HookContext


def value(registry: CollectorRegistry, name: str, prefix: str, /, **labels: str) -> float | None:
    return registry.get_sample_value(PREFIX + name, {"prefix": prefix, **labels})


def ours(registry: CollectorRegistry) -> list[str]:
    return [family.name for family in registry.collect() if family.name.startswith(PREFIX)]


def test_a_registry_shows_what_a_saver_does_beside_the_applications_own(make: Callable[..., Any], prefix: str) -> None:
    saver, registry = make(), CollectorRegistry(auto_describe=True)
    Counter("mine", "Of the application.", registry=registry)
    metrics = PrometheusMetrics(saver, registry=registry)
    put(saver, "t", 0)
    put_one(saver, "u", float("nan"))
    assert saver.flush()
    wait_until(lambda: value(registry, "backlog_threads", prefix) is not None)
    assert value(registry, "operation_duration_seconds_count", prefix, operation="put") == 2
    assert value(registry, "operation_duration_seconds_bucket", prefix, operation="put", le="+Inf") == 2
    assert value(registry, "events_total", prefix, name="put.sanitized", severity="warning") == 1
    assert value(registry, "flush_lag_seconds_count", prefix) == 2
    assert value(registry, "flushed_checkpoints_total", prefix) == 2
    assert value(registry, "tier_up", prefix, tier="postgres") == 1
    assert registry.get_sample_value("mine_total") == 0
    assert metrics.render().decode().count("# TYPE") == len(METRICS) - 1, "all but the spool, which no hook has here"


def test_closing_the_saver_takes_its_metrics_out_of_the_registry(make: Callable[..., Any]) -> None:
    saver, registry = make(), CollectorRegistry()
    metrics = PrometheusMetrics(saver, registry=registry)
    assert ours(registry)
    saver.close()
    assert ours(registry) == []
    assert not saver.instruments.is_on
    metrics.close()
    PrometheusMetrics(saver, registry=registry)
    assert ours(registry) == [], "one that is closed has nothing to show"


def test_savers_share_a_registry_and_those_of_one_prefix_are_one(make: Callable[..., Any], prefix: str) -> None:
    registry = CollectorRegistry()
    one, same, other = make(), make(), make(prefix=f"{prefix}-other")
    shown = [PrometheusMetrics(saver, registry=registry) for saver in (one, same, other)]
    for saver in (one, same, other):
        put(saver, "t", 0)
    assert one.flush()
    assert other.flush()
    text = generate_latest(registry).decode()
    assert text.count("# TYPE checkpointer_flushed_checkpoints_total") == 1
    assert value(registry, "operation_duration_seconds_count", prefix, operation="put") == 2
    assert value(registry, "operation_duration_seconds_count", f"{prefix}-other", operation="put") == 1
    shown[1].close()
    assert value(registry, "operation_duration_seconds_count", prefix, operation="put") == 1
    shown[0].close()
    shown[0].close()
    assert value(registry, "operation_duration_seconds_count", prefix, operation="put") is None
    assert ours(registry)
    shown[2].close()
    assert ours(registry) == []


def test_a_registry_with_others_metrics_under_our_names_is_refused_and_nothing_is_left(
    make: Callable[..., Any],
) -> None:
    saver, registry = make(), CollectorRegistry()
    Counter("checkpointer_events", "Of somebody else.", registry=registry)
    for _ in range(2):
        with pytest.raises(ValueError, match="Duplicated"):
            PrometheusMetrics(saver, registry=registry)
    assert not saver.instruments.is_on
    assert ours(registry) == ["checkpointer_events"]


def test_as_a_hook_it_uses_the_usual_registry_and_shows_the_spool(make: Callable[..., Any], prefix: str) -> None:
    saver = make(hooks=("prometheus", "system_errors"))
    put(saver, "t", 0)
    assert value(REGISTRY, "operation_duration_seconds_count", prefix, operation="put") == 1
    assert value(REGISTRY, "spooled_rows", prefix) == 0
    saver.close()
    assert ours(REGISTRY) == []


def test_a_worker_can_be_shown_in_the_applications_registry(
    make: Callable[..., Any], postgres_uri: str, redis_url: str, prefix: str
) -> None:
    put(make(), "t", 0)
    registry = CollectorRegistry()
    settings: Any = {"prefix": prefix, "flush_age": 0.05, "hooks": ()}
    with Worker(postgres_uri, redis_url, **settings) as worker:
        PrometheusMetrics(worker, registry=registry)
        wait_until(lambda: value(registry, "flushed_checkpoints_total", prefix) == 1)
        wait_until(lambda: value(registry, "backlog_threads", prefix) == 0)
    assert ours(registry) == []


def test_an_outage_and_what_waits_for_its_end_can_be_seen(own_servers: Servers, prefix: str) -> None:
    registry = CollectorRegistry()
    with BufferedPostgresSaver.from_conn_string(
        own_servers.postgres_uri,
        redis_url=own_servers.redis_url,
        prefix=prefix,
        hooks=("system_errors",),
        triggers=NOTHING,
        close_timeout=1.0,
    ) as saver:
        saver.setup()
        PrometheusMetrics(saver, registry=registry)
        put(saver, "t", 0)
        wait_until(lambda: value(registry, "tier_up", prefix, tier="postgres") == 1)
        own_servers.postgres.kill()
        assert not saver.flush()
        assert value(registry, "tier_up", prefix, tier="postgres") == 0, "a call that failed is known at once"
        assert value(registry, "tier_up", prefix, tier="redis") == 1
        assert value(registry, "flush_failures_total", prefix) == 1
        assert value(registry, "events_total", prefix, name="flush.failed", severity="critical") == 1
        wait_until(lambda: value(registry, "backlog_threads", prefix) == 1)
        own_servers.valkey.kill()
        # A report that neither server takes.
        saver.hooks.emit(next_event())
        wait_until(lambda: (value(registry, "spooled_rows", prefix) or 0) >= 1)
        wait_until(lambda: value(registry, "tier_up", prefix, tier="redis") == 0)
        wait_until(lambda: value(registry, "backlog_bytes", prefix) is None, message="nobody knows any more")


def next_event() -> Any:
    from checkpointer import CheckpointEvent

    return CheckpointEvent(name="made.up", error_type="made_up_error", severity="critical", message="x")


@pytest.mark.parametrize(
    ("hook", "module", "library"),
    [
        ("prometheus", "observability.prometheus", "prometheus_client"),
        ("opentelemetry", "observability.otel", "opentelemetry"),
        ("sentry", "", "sentry_sdk.integrations.logging"),
    ],
)
def test_without_the_library_one_sentence_says_what_to_install(
    hook: str, module: str, library: str, context: HookContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = rf'^To .* needs a library: pip install "langgraph-checkpoint-buffered\[{hook}\]"$'
    monkeypatch.setitem(sys.modules, library, None)
    if module:
        monkeypatch.delitem(sys.modules, module, raising=False)
        with pytest.raises(ConfigurationError, match=said):
            importlib.import_module(module)
    with pytest.raises(ConfigurationError, match=said):
        load_hook(hook, context)
