"""Whatever is sent, no route fails: requests made up from the description of the interface, to a real server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from planting import plant
from schemathesis import checks
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from observability.api import create_app

if TYPE_CHECKING:
    from conftest import Served

OPERATIONS = [
    (method.upper(), path)
    for path, methods in create_app(postgres_uri="postgresql://x/y").openapi()["paths"].items()
    for method in methods
]


@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=lambda value: value)
def test_no_request_makes_a_server_error(served: Served, api_uri: str, method: str, path: str) -> None:
    with psycopg.connect(api_uri, autocommit=True) as connection:
        for _ in range(3):
            plant(connection)
    # A stream ends as soon as it is open, so that its routes answer as others do.
    served.streams.end()
    described = schemathesis.openapi.from_url(f"{served.url}/openapi.json")

    @settings(
        max_examples=10,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
        derandomize=True,
        database=None,
    )
    @given(case=described[path][method].as_strategy())
    def call(case: Any) -> None:
        case.headers = {**(case.headers or {}), **served.headers}
        response = case.call()
        # What is answered is what is described.
        case.validate_response(
            response,
            checks=[
                checks.not_a_server_error,
                status_code_conformance,
                content_type_conformance,
                response_schema_conformance,
            ],
        )

    call()


def test_the_document_lists_each_route_with_what_it_needs() -> None:
    text = (Path(__file__).parents[3] / "docs" / "http-api.md").read_text()
    listed = dict(re.findall(r"^\| `([A-Z]+ /\S+)` \| (\S.*?) \|", text, re.MULTILINE))
    paths = create_app(postgres_uri="postgresql://x/y").openapi()["paths"]
    needed = {}
    for method, path in OPERATIONS:
        operation = paths[path][method.lower()]
        kind = operation.get("x-credentials")
        scope = operation.get("x-required-scope", "read")
        needed[f"{method} {path}"] = {"ticket": "a ticket", "none": "nothing"}.get(kind, f"`{scope}`")
    assert listed == needed
