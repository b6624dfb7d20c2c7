"""The command line: parse arguments, open what the command needs, run. Errors of the operator exit 2."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, NoReturn

import orjson
import uvloop

from app import __version__
from app.calls import LOCAL_CALLER, ToolCall, new_execution_id
from app.doctor import examine
from app.service import open_service
from app.settings import Settings, SettingsError, check_bind, read_settings
from app.telemetry.logging import log_to_stdout
from app.tools.registry import summary
from app.transport.app import create_app
from app.transport.server import CannotListen, Server

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8001
PORT_MAX = 65_535

ENDED_BY_INTERRUPT = 130
ENDED_BY_PIPE = 141
"""What a shell shows for a program that SIGINT or SIGPIPE ended."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `agentcore-tools`."""
    options = _parser().parse_args(arguments)
    try:
        settings = read_settings(os.environ, Path(".env"), profile=options.profile)
        sys.exit(options.run(settings, options))
    except SettingsError as error:
        print(f"agentcore-tools: {error}", file=sys.stderr)
        sys.exit(2)
    except CannotListen as error:
        print(f"agentcore-tools: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(ENDED_BY_INTERRUPT)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="agentcore-tools", description="Executes tools for AI agents.")
    parser.add_argument("--version", action="version", version=__version__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--profile", help="a named set of defaults: default, high-throughput, low-latency, constrained")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", parents=[common], help="run the service in the foreground")
    serve.add_argument("--host", default=DEFAULT_HOST)
    serve.add_argument("--port", type=_port, default=DEFAULT_PORT)
    serve.set_defaults(run=_serve)

    tools = commands.add_parser("tools", help="look at the registry, run a tool locally")
    actions = tools.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", parents=[common], help="every tool that would be served")
    listing.add_argument("--json", action="store_true", help="for programs")
    listing.set_defaults(run=_tools_list)
    call = actions.add_parser("call", parents=[common], help="run one tool through the whole executor")
    call.add_argument("tool", metavar="TOOL")
    call.add_argument("parameters", metavar="JSON", nargs="?", default="{}")
    call.set_defaults(run=_tools_call)

    doctor = commands.add_parser("doctor", parents=[common], help="check settings and surroundings; exit 1 when wrong")
    doctor.add_argument("--host", default=DEFAULT_HOST)
    doctor.add_argument("--port", type=_port, default=DEFAULT_PORT)
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.set_defaults(run=_doctor)
    return parser


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= PORT_MAX):
        raise argparse.ArgumentTypeError(f"must be a number from 0 to {PORT_MAX}")
    return int(text)


def _serve(settings: Settings, options: argparse.Namespace) -> int:
    check_bind(settings, options.host)
    writer = log_to_stdout(settings.log_level)

    async def serve() -> int:
        try:
            async with open_service(settings, listen=(options.host, options.port)) as service:
                service.metrics.counters["log_lines_dropped_total"] = lambda: writer.dropped
                app = create_app(service, host=options.host, port=options.port)
                await Server(app, service, options.host, options.port).serve()
                return 1 if service.lifecycle.crashed else 0
        finally:
            writer.close()

    _run(serve())


def _run(command: Coroutine[Any, Any, int]) -> NoReturn:
    """Run a command and end the process with its code: the one way out.

    From inside the loop, because leaving it waits for all its tasks and threads: one hung tool would keep the process.
    """

    async def whole() -> NoReturn:
        try:
            code = await command
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read the answer has seen enough
            code = ENDED_BY_PIPE
        except asyncio.CancelledError:
            code = ENDED_BY_INTERRUPT
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(code)

    uvloop.run(whole())
    raise AssertionError("the process has ended")


def _tools_list(settings: Settings, options: argparse.Namespace) -> int:
    async def listed() -> int:
        async with open_service(settings) as service:
            snapshot = service.registry.snapshot
            tools = [summary(snapshot.tools[tool_id].spec) for tool_id in snapshot.ids]
        if options.json:
            _print_json(tools)
            return 0
        for tool in tools:
            print(f"{tool['tool_id']:<20} {tool['category']:<16} {tool['description'].splitlines()[0]}")
        return 0

    _run(listed())


def _tools_call(settings: Settings, options: argparse.Namespace) -> int:
    try:
        parameters = orjson.loads(options.parameters)
    except orjson.JSONDecodeError:
        print("agentcore-tools: the parameters are not valid JSON", file=sys.stderr)
        return 2

    async def called() -> int:
        async with open_service(settings) as service:
            execution = await service.executor.execute(
                ToolCall(new_execution_id(), options.tool, parameters, LOCAL_CALLER, time.perf_counter())
            )
            refusal = execution.refusal
            _print_json(execution.as_dict() if refusal is None else {"error": refusal.as_error()})
        return 0 if execution.status == "success" and refusal is None else 1

    _run(called())


def _doctor(settings: Settings, options: argparse.Namespace) -> int:
    async def examined() -> int:
        async with open_service(settings) as service:
            findings = await asyncio.to_thread(lambda: list(examine(service, options.host, options.port)))
        if options.json:
            _print_json([finding._asdict() for finding in findings])
        else:
            for finding in findings:
                print(f"{'ok ' if finding.ok else 'BAD'}  {finding.what}: {finding.says}")
        return 0 if all(finding.ok for finding in findings) else 1

    _run(examined())


def _print_json(value: Any) -> None:
    sys.stdout.buffer.write(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    sys.stdout.flush()
