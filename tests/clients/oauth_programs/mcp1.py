"""The official Python SDK 1.x: turned away, authorized, let in."""

import asyncio
import json
import sys
from urllib.parse import parse_qs, urlsplit

import httpx
from mcp import ClientSession
from mcp.client.auth import OAuthClientProvider
from mcp.client.streamable_http import streamablehttp_client
from mcp.shared.auth import OAuthClientMetadata

kept = {}
back = {}


class Memory:
    async def get_tokens(self):
        return kept.get("tokens")

    async def set_tokens(self, tokens):
        kept["tokens"] = tokens

    async def get_client_info(self):
        return kept.get("client")

    async def set_client_info(self, client_info):
        kept["client"] = client_info


async def browse(url: str) -> None:
    async with httpx.AsyncClient() as http:
        answer = await http.get(url)
    back.update(parse_qs(urlsplit(answer.headers["location"]).query))


async def came_back() -> tuple[str, str]:
    return back["code"][0], back["state"][0]


async def main() -> None:
    metadata = OAuthClientMetadata(client_name="agent", redirect_uris=["http://127.0.0.1:1/callback"])
    auth = OAuthClientProvider(sys.argv[1], metadata, Memory(), browse, came_back)
    async with streamablehttp_client(sys.argv[1], auth=auth) as (read, write, _), ClientSession(read, write) as client:
        await client.initialize()
        echo = await client.call_tool("echo", {"message": "hi"})
    print(json.dumps(echo.structuredContent))


asyncio.run(main())
