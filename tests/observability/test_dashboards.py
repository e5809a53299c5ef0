"""The dashboard and the alert rules ask only for what is really shown after a put, a flush and a failure."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from helpers import put_one, wait_until
from prometheus_client import CollectorRegistry
from savers import NOTHING

from checkpointer import BufferedPostgresSaver, ConfigurationError
from observability import dashboards
from observability.prometheus import PrometheusMetrics

if TYPE_CHECKING:
    from checkpointer.embedded import Servers

SELECTOR = re.compile(r"(checkpointer_\w+)(?:\{([^}]*)\})?")


def expressions() -> list[str]:
    panels = json.loads(dashboards.text("grafana.json"))["panels"]
    rules = [rule for group in yaml.safe_load(dashboards.text("alerts.yml"))["groups"] for rule in group["rules"]]
    assert all(rule["annotations"]["summary"] and rule["annotations"]["action"] for rule in rules)
    assert {rule["labels"]["severity"] for rule in rules} == {"critical", "warning"}
    return [target["expr"] for panel in panels for target in panel["targets"]] + [rule["expr"] for rule in rules]


def test_every_metric_asked_for_is_shown_with_the_labels_asked_for(own_servers: Servers, prefix: str) -> None:
    registry = CollectorRegistry()
    with BufferedPostgresSaver.from_conn_string(
        own_servers.postgres_uri, redis_url=own_servers.redis_url, prefix=prefix, triggers=NOTHING, close_timeout=0.5
    ) as saver:
        saver.setup()
        PrometheusMetrics(saver, registry=registry)
        put_one(saver, "t")
        assert saver.flush()
        wait_until(lambda: registry.get_sample_value("checkpointer_backlog_threads", {"prefix": prefix}) is not None)
        own_servers.postgres.kill()
        put_one(saver, "t")
        assert not saver.flush()
        samples = [sample for family in registry.collect() for sample in family.samples]
    selectors = [found for expression in expressions() for found in SELECTOR.findall(expression)]
    assert len(selectors) > 30
    for name, matchers in selectors:
        mine: list[Any] = [sample for sample in samples if sample.name == name]
        for label, how, wanted in re.findall(r'(\w+)(=~|!=|=)"([^"]*)"', matchers):
            pattern = ".*" if wanted == "$prefix" else wanted if how == "=~" else re.escape(wanted)
            mine = [
                one for one in mine
                if label in one.labels and bool(re.fullmatch(pattern, one.labels[label])) == (how != "!=")
            ]  # fmt: skip
        assert mine, f"{name}{{{matchers}}} is not shown"


def test_a_file_that_is_not_there_is_told_from_those_that_are() -> None:
    assert dashboards.names() == ["alerts.yml", "grafana.json"]
    with pytest.raises(ConfigurationError, match=r"alerts\.yml, grafana\.json"):
        dashboards.text("grafana.yml")
