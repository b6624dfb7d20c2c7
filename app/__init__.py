"""AgentCore Tools: executes tools for AI agents. ARCHITECTURE.md shows the rooms and the way a call takes."""

__version__ = "0.1.0"
