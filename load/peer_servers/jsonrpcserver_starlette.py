"""jsonrpcserver in a Starlette route, with orjson for both directions and without its check by JSON Schema."""

from __future__ import annotations

from typing import Any

import orjson
from jsonrpcserver import Result, Success, async_dispatch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from load.peer_servers.serving import serve


async def echo(message: str) -> Result:
    """Return the message."""
    return Success({"message": message})


async def answer(request: Request) -> Response:
    written = await async_dispatch(
        (await request.body()).decode(),
        methods={"echo": echo},
        deserializer=orjson.loads,
        serializer=_written,
        validator=_any,
    )
    return Response(written, media_type="application/json")


def _written(value: Any) -> str:
    return orjson.dumps(value).decode()


def _any(_: Any) -> None:
    """jsonrpcserver's own takes some tenths of a millisecond; it is replaced as its documentation shows."""


if __name__ == "__main__":
    serve(Starlette(routes=[Route("/api/v1/jsonrpc", answer, methods=["POST"])]))
