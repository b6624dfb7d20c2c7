"""Every block of docs/clients.md, run as it stands there; only the address is that of the test's own service."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from app.transport.mcp_methods import PAGE_TOOLS
from tests.clients import environments
from tests.clients.conftest import Guarded
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "clients.md").read_text()
ADDRESS = "http://127.0.0.1:8001"

BLOCKS = [
    (heading, language, code)
    for heading, section in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    for language, code in re.findall(r"^```(\w+)\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
]

ENVIRONMENT_OF = {
    "LangChain": "langchain",
    "OpenAI Agents": "openai-agents",
    "pydantic-ai": "pydantic-ai",
    "Google ADK": "google-adk",
}
"""The others need nothing that is not in the environment of the tests."""

APPLICATION = """
import asyncio, json, os, sys
from mcp import Client
from mcp.client.stdio import StdioServerParameters

async def main():
    (server,) = json.loads(sys.argv[1])["mcpServers"].values()
    env = {**os.environ, **server.pop("env"), "AGENTCORE_KEY": os.environ["AGENTCORE_KEY"]}
    env |= {"MCP_REMOTE_CONFIG_DIR": sys.argv[3]}
    async with Client(StdioServerParameters(**server, env=env, cwd=sys.argv[2])) as client:
        print((await client.call_tool("echo", {"message": "hi"})).structured_content["message"])

asyncio.run(main())
"""
"""What an application does with a configuration: it starts the program and speaks MCP to it. npx takes what is there
in the folder."""


def test_the_page_shows_the_ways_that_it_promises() -> None:
    assert PAGE.count("```") == 2 * len(BLOCKS)
    assert [heading for heading, _, _ in BLOCKS] == [
        *["curl"] * 2,
        "Python (httpx)",
        "MCP SDK for Python",
        *ENVIRONMENT_OF,
        "TypeScript",
        "Desktop applications and editors",
    ]


@pytest.mark.parametrize(("heading", "language", "code"), BLOCKS, ids=[block[0] for block in BLOCKS])
def test_it_works_as_it_stands(guarded: Guarded, tmp_path: Path, heading: str, language: str, code: str) -> None:
    assert ADDRESS in code
    command = command_for(heading, language, code.replace(ADDRESS, guarded.service.url), tmp_path)
    done = environments.run(command, AGENTCORE_KEY=guarded.key)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\bhi\b", done.stdout), done.stdout


def command_for(heading: str, language: str, code: str, folder: Path) -> list[str]:
    if language == "sh":
        return ["bash", "-euc", code]
    if language == "ts":
        module = folder / "page.mjs"
        module.write_text(code)
        return environments.node_command(module)
    if language == "json":
        return [sys.executable, "-I", "-c", APPLICATION, code, str(environments.node_folder()), str(folder)]
    name = ENVIRONMENT_OF.get(heading)
    return [environments.python_of(name) if name else sys.executable, "-I", "-c", code]


def test_the_versions_on_the_page_are_those_that_are_locked() -> None:
    """Of every library that is tried; the environment of the tests has the SDK itself."""
    tried = re.findall(r"^\| (`.*?) \| (.+?) \|", PAGE, re.MULTILINE)
    told = set()
    for names, versions in tried:
        libraries = [name.partition("[")[0] for name in re.findall(r"`([^`]+)`", names)]
        numbers = versions.split(", ")
        told |= set(zip(libraries * (len(numbers) // len(libraries)), numbers, strict=True))
    assert len(told) > len(environments.names())
    npm = {tuple(package.rsplit("@", 1)) for package in environments.NODE_PACKAGES}
    locks = {lock.stem: lock.read_text() for lock in environments.LOCKS.glob("*.txt")}
    locked = {found for text in locks.values() for found in re.findall(r"^([\w-]+)==([\w.]+)", text, re.MULTILINE)}
    assert told <= locked | npm, told - locked - npm


def test_clients_that_read_one_page_are_told_how_long_it_is() -> None:
    assert re.findall(r"A page of `tools/list` has (\d+) tools", PAGE) == [str(PAGE_TOOLS)]
