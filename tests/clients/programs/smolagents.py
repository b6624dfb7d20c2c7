"""smolagents: its tools, called as its agents call them."""

import json
import os
import sys

from smolagents import MCPClient

HEADERS = {"Authorization": f"Bearer {os.environ['KEY']}"} if "KEY" in os.environ else None

with MCPClient({"url": sys.argv[1], "headers": HEADERS}, structured_output=True) as listed:
    tools = {tool.name: tool for tool in listed}
    echo = tools["echo"](message="hi")
print(json.dumps({"tools": len(tools), "echo": echo if isinstance(echo, dict) else json.loads(echo)}))
