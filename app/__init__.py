"""AgentCore Tools: executes tools for AI agents. ARCHITECTURE.md shows the rooms and the way a call takes."""

import os
import sys

__version__ = "0.1.0"

SERVICE = "agentcore-tools"
"""What it calls itself, to clients and in traces."""

PROPAGATORS = os.environ.pop("OTEL_PROPAGATORS", "")
"""What was asked for, before anything else is imported: FastAPI brings OpenTelemetry's propagators, and those raise for
one that is not installed. The service itself passes W3C Trace Context on and nothing else."""

if sys.flags.optimize > 1:
    sys.stderr.write("docstrings are what agents choose tools by: run Python without -OO (PYTHONOPTIMIZE at most 1)\n")
    raise SystemExit(2)
