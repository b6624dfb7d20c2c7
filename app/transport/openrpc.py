"""The OpenRPC document (https://spec.open-rpc.org, 1.3.2) of the method table; `rpc.discover` serves it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from app import __version__
from app.errors import REFUSALS
from app.transport.methods import MethodSpec

REFERENCE = "#/components/schemas/{model}"


def openrpc_document(table: Iterable[MethodSpec], public_url: str | None) -> dict[str, Any]:
    """Every method with its params, its result and the errors that it can answer."""
    table = list(table)
    schemas = schemas_of([spec.params for spec in table], [spec.result for spec in table if spec.result])
    return {
        "openrpc": "1.3.2",
        "info": {"title": "AgentCore Tools", "version": __version__},
        "servers": [{"name": "this", "url": f"{public_url or 'http://127.0.0.1:8001'}/api/v1/jsonrpc"}],
        "methods": [_method(spec, schemas) for spec in table],
        "components": {"schemas": schemas},
    }


def schemas_of(taken: Iterable[type[BaseModel]], given: Iterable[type[BaseModel]]) -> dict[str, Any]:
    """JSON Schemas of what the service takes and of what it gives, by name of the model."""
    takes: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "validation") for model in taken]
    gives: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "serialization") for model in given]
    _, components = models_json_schema([*takes, *gives], by_alias=False, ref_template=REFERENCE)
    schemas: dict[str, Any] = components["$defs"]
    return schemas


def _method(spec: MethodSpec, schemas: dict[str, Any]) -> dict[str, Any]:
    params = schemas[spec.params.__name__]
    required = set(params.get("required", ()))
    return {
        "name": spec.name,
        "summary": spec.summary,
        "paramStructure": "either",
        "params": [
            {"name": name, "required": name in required, "schema": schema}
            for name, schema in params.get("properties", {}).items()
        ],
        "result": {
            "name": "result",
            "schema": {"$ref": REFERENCE.format(model=spec.result.__name__)} if spec.result else {"type": "object"},
        },
        "errors": [{"code": kind.rpc_code, "message": kind.error_type} for kind in REFUSALS],
    }
