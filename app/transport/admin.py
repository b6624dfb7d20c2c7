"""REST for administrators: the keys of all callers, kept results. Scope `admin`, which no key has unless it was named.

Owns the shapes of these routes. A key's secret is in the answer that makes it and in no other.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from app.access.authenticator import Authenticator
from app.access.keys import SCOPE_ADMIN, Key, NewKey, is_id
from app.access.store import KeyStore
from app.errors import DependencyUnavailable, InvalidParams, MethodNotFound
from app.tools.registry import Registry
from app.transport.door import ClientGone, read_body
from app.transport.examples import Json
from app.transport.gate import caller_with
from app.transport.jsonrpc import decode
from app.transport.openapi import Operation, query_parameters, reference, response
from app.transport.rest import read_query, validated
from app.transport.shapes import NoParams, Params

PAGE_DEFAULT = 100
PAGE_MAX = 1_000

REFUSALS = (403, 414, 422, 500, 503)


class KeysQuery(Params):
    limit: Annotated[int, Field(ge=1, le=PAGE_MAX)] | None = Field(
        None, description=f"Keys a page; {PAGE_DEFAULT} when not given"
    )
    cursor: Annotated[str, Field(max_length=64)] | None = Field(None, description="next_cursor of the page before")


class KeyShown(BaseModel):
    """A key without its secret, as `Key.shown` gives it."""

    id: str
    tenant: str
    subject: str
    scopes: list[str]
    tools: list[str]
    limit_class: str
    created_at: str
    expires_at: str | None
    revoked_at: str | None


class KeyMade(KeyShown):
    key: str = Field(description="The credential. It is shown this once")


class Forgotten(BaseModel):
    tool_id: str
    forgotten: bool


class KeyPage(BaseModel):
    keys: list[KeyShown]
    count: int
    next_cursor: str | None


class KeyRoutes:
    """The endpoints under /api/v1/admin/keys. The scope is looked at before anything else of a request."""

    def __init__(self, keys: KeyStore, access: Authenticator, body_bytes_max: int, read_timeout_s: float) -> None:
        self._keys = keys
        self._access = access
        self._body_bytes_max = body_bytes_max
        self._read_timeout_s = read_timeout_s

    def router(self) -> APIRouter:
        routes = APIRouter(prefix="/api/v1/admin/keys", tags=["admin"], default_response_class=Response)
        routes.add_api_route("", self.listing, methods=["GET"], **LIST_KEYS.described(REFUSALS))
        routes.add_api_route("", self.create, methods=["POST"], **CREATE_KEY.described((*REFUSALS, 400, 408, 413)))
        routes.add_api_route("/{key_id}", self.one, methods=["GET"], **GET_KEY.described((*REFUSALS, 404)))
        routes.add_api_route("/{key_id}", self.revoke, methods=["DELETE"], **REVOKE_KEY.described((*REFUSALS, 404)))
        return routes

    async def listing(self, request: Request) -> Response:
        caller_with(request, SCOPE_ADMIN)
        asked = read_query(request, KeysQuery)
        if asked.cursor is not None and not is_id(asked.cursor):
            raise InvalidParams.at("cursor", "Not a cursor that this service gave")
        keys, next_cursor = await self._keys.page(asked.limit or PAGE_DEFAULT, asked.cursor or "")
        return _json({"keys": [key.shown() for key in keys], "count": len(keys), "next_cursor": next_cursor})

    async def create(self, request: Request) -> Response:
        caller_with(request, SCOPE_ADMIN)
        read_query(request, NoParams)
        try:
            body = await read_body(request.receive, self._body_bytes_max, self._read_timeout_s)
        except ClientGone:
            return Response(status_code=400)  # nobody is there to be given a key
        key, credential = await self._keys.create(validated(NewKey, decode(body), strict=True))
        return _json({**key.shown(), "key": credential}, 201)

    async def one(self, request: Request) -> Response:
        caller_with(request, SCOPE_ADMIN)
        read_query(request, NoParams)
        return _json(_there(await self._keys.one(request.path_params["key_id"])).shown())

    async def revoke(self, request: Request) -> Response:
        caller_with(request, SCOPE_ADMIN)
        read_query(request, NoParams)
        key = _there(await self._keys.revoke(request.path_params["key_id"]))
        self._access.forget(key.id)
        return _json(key.shown())


def _there(key: Key | None) -> Key:
    if key is None:
        raise MethodNotFound("No such key; GET /api/v1/admin/keys lists them")
    return key


class CacheRoutes:
    """The endpoint under /api/v1/admin/cache."""

    def __init__(self, registry: Registry, forget: Callable[[str], Awaitable[None]]) -> None:
        self._registry = registry
        self._forget = forget

    def router(self) -> APIRouter:
        routes = APIRouter(prefix="/api/v1/admin/cache", tags=["admin"], default_response_class=Response)
        described = FORGET_RESULTS.described((*REFUSALS, 404))
        routes.add_api_route("/{tool_id}", self.forget, methods=["DELETE"], **described)
        return routes

    async def forget(self, request: Request) -> Response:
        caller = caller_with(request, SCOPE_ADMIN)
        read_query(request, NoParams)
        tool_id = self._registry.lookup(request.path_params["tool_id"], caller).spec.id
        try:
            await self._forget(tool_id)
        except ConnectionError:
            message = "Redis is away; other replicas could not be told"
            raise DependencyUnavailable(message, retry_after_ms=1_000) from None
        return _json({"tool_id": tool_id, "forgotten": True})


def _json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


# What the routes say of themselves

_SHOWN: Json = {
    "id": "0199f1d2c3a40b1c2d3e",
    "tenant": "acme",
    "subject": "planner",
    "scopes": ["tools:execute", "tools:read"],
    "tools": ["web_*", "echo"],
    "limit_class": "default",
    "created_at": "2026-11-20T15:00:00.000Z",
    "expires_at": "2027-02-18T15:00:00.000Z",
    "revoked_at": None,
}
_NEW: Json = {
    "tenant": "acme",
    "subject": "planner",
    "scopes": ["tools:execute", "tools:read"],
    "tools": ["web_*", "echo"],
    "expires_in": "90d",
}

LIST_KEYS = Operation(
    "listKeys",
    "Keys of all callers",
    "In the order in which they were made, revoked and expired ones too. Needs the scope `admin`.",
    response(
        "The keys, without their secrets",
        reference("KeyPage"),
        {"page": {"keys": [_SHOWN], "count": 1, "next_cursor": None}},
    ),
    {"parameters": query_parameters(KeysQuery, {"limit": 20})},
)
CREATE_KEY = Operation(
    "createKey",
    "Make a key",
    "`key` of the answer is the credential: it is shown this once. Needs the scope `admin`.",
    response(
        "The key", reference("KeyMade"), {"made": {**_SHOWN, "key": f"act_{_SHOWN['id']}_{'0123456789abcdef' * 4}"}}
    ),
    {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": reference("NewKey"),
                    "examples": {
                        "least": {"value": {"tenant": "acme", "subject": "planner"}, "x-status": 201},
                        "narrow": {"value": _NEW, "x-status": 201},
                    },
                }
            },
        }
    },
    status=201,
)
_KEY_ID: Json = {
    "name": "key_id",
    "in": "path",
    "required": True,
    "description": "Id of the key: the part after act_, up to the next _",
    "schema": {"type": "string", "pattern": "^[0-9a-f]{20}$"},
}
GET_KEY = Operation(
    "getKey",
    "One key",
    "Revoked and expired ones too. Needs the scope `admin`.",
    response("The key, without its secret", reference("KeyShown"), {"key": _SHOWN}),
    {"parameters": [_KEY_ID]},
)
REVOKE_KEY = Operation(
    "revokeKey",
    "Revoke a key",
    "Takes effect within 5 s on every replica. Again is no error. Needs the scope `admin`.",
    response(
        "The key as it is now", reference("KeyShown"), {"revoked": {**_SHOWN, "revoked_at": _SHOWN["created_at"]}}
    ),
    {"parameters": [_KEY_ID]},
)
FORGET_RESULTS = Operation(
    "forgetResults",
    "Forget the kept results of a tool",
    "On every replica. The next call of the tool runs it. Needs the scope `admin`.",
    response(
        "They are forgotten", reference("Forgotten"), {"forgotten": {"tool_id": "wikipedia_search", "forgotten": True}}
    ),
    {
        "parameters": [
            {
                "name": "tool_id",
                "in": "path",
                "required": True,
                "description": "Id of the tool, as tools.list gives it",
                "schema": {"type": "string"},
                "example": "wikipedia_search",
            }
        ]
    },
)
