"""fastmcp: stateless, JSON instead of event streams, as its guide to deployment over HTTP has it for scaling out."""

from __future__ import annotations

from fastmcp import FastMCP

from load.peer_servers.serving import serve

server: FastMCP = FastMCP("echo")


async def echo(message: str) -> dict[str, str]:
    """Return the message."""
    return {"message": message}


if __name__ == "__main__":
    server.tool(echo)
    serve(server.http_app(stateless_http=True, json_response=True))
