"""fastapi-jsonrpc: one entry point, one method, no middleware."""

from __future__ import annotations

import fastapi_jsonrpc as jsonrpc
from fastapi import Body

from load.peer_servers.serving import serve

entry = jsonrpc.Entrypoint("/api/v1/jsonrpc")


async def echo(message: str = Body(...)) -> dict[str, str]:
    """Return the message."""
    return {"message": message}


if __name__ == "__main__":
    entry.method(name="echo")(echo)
    app = jsonrpc.API()
    app.bind_entrypoint(entry)
    serve(app)
