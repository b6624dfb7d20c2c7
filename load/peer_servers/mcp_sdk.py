"""The MCP SDK's own server: stateless, JSON instead of event streams."""

from __future__ import annotations

from mcp.server.mcpserver import MCPServer
from mcp.server.transport_security import TransportSecuritySettings

from load.peer_servers.serving import serve

server = MCPServer("echo", log_level="ERROR")


async def echo(message: str) -> dict[str, str]:
    """Return the message."""
    return {"message": message}


if __name__ == "__main__":
    server.tool()(echo)
    # Its guard against DNS rebinding wants a port in each Host header; without it the server is a little faster.
    security = TransportSecuritySettings(enable_dns_rebinding_protection=False)
    serve(server.streamable_http_app(stateless_http=True, json_response=True, transport_security=security))
