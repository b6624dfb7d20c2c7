"""AgentCore Tools: executes tools for AI agents. ARCHITECTURE.md shows the rooms and the way a call takes."""

import os

__version__ = "0.1.0"

PROPAGATORS = os.environ.pop("OTEL_PROPAGATORS", "")
"""What was asked for, before anything else is imported: FastAPI brings OpenTelemetry's propagators, and those raise for
one that is not installed. The service itself passes W3C Trace Context on and nothing else."""
