"""The OpenRPC document (https://spec.open-rpc.org) of the method table; `rpc.discover` serves it.

Every example in it can be sent as it stands, by name or by position, and its result fits the result's schema.
"""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from app import __version__
from app.errors import REFUSALS, ErrorKind
from app.transport.examples import EXAMPLES, OPENRPC, Json
from app.transport.methods import MethodSpec

OPENRPC_VERSION = "1.2.6"
"""The newest that @open-rpc/test-coverage takes; nothing of 1.3 is used, whose meta-schema takes this number too."""

REFERENCE = "#/components/schemas/{model}"


def openrpc_document(table: Iterable[MethodSpec], base_url: str) -> Json:
    """Every method with its params, its result, an example of both, and the errors of this service."""
    table = list(table)
    schemas = schemas_of([spec.params for spec in table], [spec.result for spec in table if spec.result])
    return {
        "openrpc": OPENRPC_VERSION,
        "info": {"title": "AgentCore Tools", "version": __version__},
        "servers": [{"name": "this", "url": f"{base_url}/api/v1/jsonrpc"}],
        "methods": [_method(spec, schemas) for spec in table],
        "components": {"schemas": schemas},
    }


def schemas_of(taken: Iterable[type[BaseModel]], given: Iterable[type[BaseModel]]) -> Json:
    """JSON Schemas of what the service takes and of what it gives, by name of the model."""
    takes: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "validation") for model in taken]
    gives: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "serialization") for model in given]
    _, components = models_json_schema([*takes, *gives], by_alias=False, ref_template=REFERENCE)
    schemas: Json = components["$defs"]
    return schemas


def _method(spec: MethodSpec, schemas: Json) -> Json:
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
            "schema": {"$ref": REFERENCE.format(model=spec.result.__name__)} if spec.result else OPENRPC,
        },
        "errors": [_error(kind) for kind in REFUSALS],
        "examples": _examples(spec),
    }


def _error(kind: ErrorKind) -> Json:
    data = {"error_type": kind.error_type, "retryable": kind.retryable}
    return {"code": kind.rpc_code, "message": kind.error_type, "data": data}


def _examples(spec: MethodSpec) -> list[Json]:
    """Clients send the values of an example by position, so what is left out before the last one is null."""
    if spec.name not in EXAMPLES:
        return []
    params, result = EXAMPLES[spec.name]
    names = list(spec.params.model_fields)
    given = max((names.index(name) + 1 for name in params), default=0)
    return [
        {
            "name": "plain",
            "params": [{"name": name, "value": params.get(name)} for name in names[:given]],
            "result": {"name": "result", "value": result},
        }
    ]
