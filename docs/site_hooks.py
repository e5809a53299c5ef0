"""What `mkdocs` has to be told while it builds the site: the list of routes, made from the application's description.

Not here: the pages' text, and the reference of Python names, which mkdocstrings makes.
"""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mkdocs.structure.files import Files

_PAGE = "reference/routes.md"
_PLACE = "<!-- The list is put here when the site is built (docs/site_hooks.py). -->"
_FILE = "reference/openapi.json"
_CREDENTIALS = {"ticket": "a ticket", "none": "nothing"}


def on_files(files: Files, config: Any) -> Files:
    """Add the description of the HTTP interface as a file."""
    files.append(File.generated(config, _FILE, content=json.dumps(_described())))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the list of routes where it belongs."""
    if page.file.src_uri != _PAGE:
        return markdown
    if _PLACE not in markdown:
        raise ValueError(f"{_PAGE} has no place for the list of routes: {_PLACE}")
    return markdown.replace(_PLACE, "\n".join(_routes()))


@cache
def _described() -> dict[str, Any]:
    from observability.api import create_app

    # It connects when it is asked something, which it is not.
    return create_app(postgres_uri="postgresql://localhost/none").openapi()


def _routes() -> Iterator[str]:
    described = _described()
    yield "The whole description: [openapi.json](openapi.json).\n"
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            yield from _route(f"{method.upper()} {path}", operation, described)


def _route(name: str, operation: dict[str, Any], described: dict[str, Any]) -> Iterator[str]:
    kind = operation.get("x-credentials")
    needs = _CREDENTIALS.get(kind) or f"the scope `{operation.get('x-required-scope', 'read')}`"
    yield f"## `{name}`\n"
    yield f"{_text(operation.get('description') or operation.get('summary') or '')}\n"
    yield f"Needs {needs}.\n"
    parameters = operation.get("parameters", [])
    if parameters:
        yield "| parameter | in | type | |\n|---|---|---|---|"
        for one in parameters:
            required = "required. " if one.get("required") else ""
            about = _cell(one.get("description") or one["schema"].get("description") or "")
            yield f"| `{one['name']}` | {one['in']} | {_type(one['schema'])} | {required}{about} |"
        yield ""
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    if body:
        yield "Body:\n"
        yield from _fields(body, described)
    yield "| answer | |\n|---|---|"
    for status, answer in operation["responses"].items():
        yield f"| {status} | {_cell(answer.get('description', ''))} |"
    yield ""


def _fields(schema: dict[str, Any], described: dict[str, Any]) -> Iterator[str]:
    if "$ref" in schema:
        schema = described["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    yield "| field | type | |\n|---|---|---|"
    for name, field in schema.get("properties", {}).items():
        yield f"| `{name}` | {_type(field)} | {_cell(field.get('description', ''))} |"
    yield ""


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:
        return ", ".join(_type(one) for one in schema["anyOf"] if one.get("type") != "null")
    kind = str(schema.get("type", "any"))
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return f"{kind} ({schema['format']})" if "format" in schema else kind


def _cell(text: str) -> str:
    return _text(text).replace("|", "\\|").replace("\n", " ")


def _text(text: str) -> str:
    # What stands between angle brackets would be an element.
    return text.replace("<", "&lt;").strip()
