"""The command line: parse arguments, open what the command needs, run. Errors of the operator exit 2."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import asyncpg
import orjson
from pydantic import ValidationError
from sqlalchemy.ext.asyncio import AsyncEngine

from app import __version__
from app.access.keys import LIFE_RULE, NewKey
from app.access.store import KeyStore
from app.calls import DEFAULT_SCOPES, LOCAL_CALLER, ToolCall, new_execution_id
from app.clients import close_engine, create_engine, reason
from app.doctor import Finding, examine, examine_refused
from app.execution_log.connections import StoreAway
from app.execution_log.partitions import ensure_partitions
from app.migration import NEWEST, MigrationError, is_current, migrate, version
from app.process import ENDED_BY_INTERRUPT, NOWHERE, flush_briefly, is_somewhere, open_standard_files, run, said
from app.reload import Watched, serve_reloading, watched_folders
from app.service import Service, open_service
from app.settings import Settings, SettingsError, check_bind, otel_variables, read_settings
from app.telemetry.logging import log_to_stderr, log_to_stdout
from app.telemetry.own_logging import watching_logging
from app.telemetry.printing import printing_as_events
from app.tools.exports import FORMATS, export
from app.tools.registry import summary
from app.transport.app import create_app
from app.transport.server import Server

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8001
PORT_MAX = 65_535
DOTENV = Path(".env")

MIGRATION_TIMEOUT_S = 3600.0
"""For one statement: to write a large table anew takes its time, and half of it is worth nothing."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, end the process."""
    open_standard_files()
    options = _parser().parse_args(arguments)
    if options.run is not _serve:
        log_to_stderr()
    try:
        settings = read_settings(os.environ, DOTENV, profile=options.profile)
        if not getattr(options, "reload", False):  # each process that it starts reads them anew
            for name, value in otel_variables(DOTENV).items():
                os.environ.setdefault(name, value)
        sys.exit(options.run(settings, options))
    except SettingsError as error:
        sys.exit(_doctor_refused(error, options) if options.run is _doctor else said(error))
    except KeyboardInterrupt:
        sys.exit(ENDED_BY_INTERRUPT)
    except FileNotFoundError:
        if is_somewhere():
            raise
        sys.exit(said(FileNotFoundError(NOWHERE)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="agentcore-tools", description="Executes tools for AI agents.")
    parser.add_argument("--version", action="version", version=__version__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--profile", help="a named set of defaults: default, high-throughput, low-latency, constrained")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", parents=[common], help="run the service in the foreground")
    serve.add_argument("--host", type=_host, default=DEFAULT_HOST)
    serve.add_argument("--port", type=_port, default=DEFAULT_PORT)
    serve.add_argument(
        "--reload", action="store_true", help="for development: drain and start anew when code, tools or .env change"
    )
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
    exporting = actions.add_parser("export", parents=[common], help="definitions of all tools for a model provider")
    exporting.add_argument(
        "--format", choices=FORMATS, default=FORMATS[0], help=f"whose shape; {FORMATS[0]} if not given"
    )
    exporting.set_defaults(run=_tools_export)
    invalidating = actions.add_parser(
        "invalidate", parents=[common], help="forget the kept results of a tool on every replica (needs REDIS_URL)"
    )
    invalidating.add_argument("tool", metavar="TOOL")
    invalidating.set_defaults(run=_tools_invalidate)

    migrate = commands.add_parser("migrate", parents=[common], help="bring the database up to date")
    migrate.add_argument("revision", metavar="REVISION", nargs="?", default=NEWEST, help="the newest when not given")
    migrate.set_defaults(run=_migrate)

    _add_keys(commands.add_parser("keys", help="API keys of callers"), common)

    doctor = commands.add_parser("doctor", parents=[common], help="check settings and surroundings; exit 1 when wrong")
    doctor.add_argument("--host", type=_host, default=DEFAULT_HOST)
    doctor.add_argument("--port", type=_port, default=DEFAULT_PORT)
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_keys(keys: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    actions = keys.add_subparsers(required=True, metavar="ACTION")
    create = actions.add_parser("create", parents=[common], help="make a key; its secret is shown once")
    create.add_argument("--tenant", required=True, help="whom the caller belongs to")
    create.add_argument("--subject", required=True, help="who calls")
    create.add_argument(
        "--scope", action="extend", nargs="+", help=f"what it may do; without: {' '.join(sorted(DEFAULT_SCOPES))}"
    )
    create.add_argument(
        "--tool", metavar="GLOB", action="extend", nargs="+", help="ids of tools it may call; without: *"
    )
    create.add_argument("--class", dest="limit_class", help="what limit policies match as class")
    create.add_argument("--expires-in", metavar="TIME", help="as 90d, 12h, 30m; without: never")
    create.set_defaults(run=_keys_create)
    listing = actions.add_parser("list", parents=[common], help="every key, without its secret")
    listing.set_defaults(run=_keys_list)
    revoke = actions.add_parser("revoke", parents=[common], help="refuse a key from now on, within 5 s everywhere")
    revoke.add_argument("id", metavar="ID")
    revoke.set_defaults(run=_keys_revoke)
    for action in (create, listing, revoke):
        action.add_argument("--json", action="store_true", help="for programs")


def _host(text: str) -> str:
    if _legible(text) != text:
        raise argparse.ArgumentTypeError("must be text in UTF-8")
    return text


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= PORT_MAX):
        raise argparse.ArgumentTypeError(f"must be a number from 0 to {PORT_MAX}")
    return int(text)


def _serve(settings: Settings, options: argparse.Namespace) -> int:
    return _serve_reloading(settings, options) if options.reload else _serve_once(settings, options)


def _serve_reloading(settings: Settings, options: argparse.Namespace) -> int:
    profile = () if options.profile is None else ("--profile", options.profile)
    arguments = ("--host", options.host, "--port", str(options.port), *profile)

    def watched() -> Watched:
        nonlocal settings
        with contextlib.suppress(SettingsError):  # the service says what is wrong
            settings = read_settings(os.environ, DOTENV, profile=options.profile)
        files = [DOTENV] if settings.limits_file is None else [DOTENV, settings.limits_file]
        return Watched(watched_folders(settings.tool_modules), files)

    return serve_reloading(arguments, watched)


def _serve_once(settings: Settings, options: argparse.Namespace) -> NoReturn:
    writer = log_to_stdout(settings.log_level)

    async def serve() -> int:
        with contextlib.ExitStack() as stack:
            stack.callback(writer.end)
            stack.enter_context(printing_as_events(writer))
            async with open_service(settings, listen=(options.host, options.port)) as service:
                check_start(service, options.host)
                service.metrics.counters["log_lines_dropped_total"] = lambda: writer.dropped
                app = create_app(service, host=options.host, port=options.port)
                stack.enter_context(watching_logging())  # not before: the service has loggers of its own to make
                await Server(app, service, options.host, options.port).serve()
                return 1 if service.lifecycle.crashed else 0

    run(serve(), flush=flush_briefly)


def check_start(service: Service, host: str) -> None:
    """Refuse what would serve everybody, or could serve nobody and will not mend itself. Raises SettingsError."""
    check_bind(service.settings, host, service.access.keys_exist)
    if service.database.problem is not None and service.settings.auth_mode != "none":
        raise SettingsError(f"DATABASE_URL: {service.database.problem}")


def _tools_list(settings: Settings, options: argparse.Namespace) -> int:
    async def listed() -> int:
        async with open_service(settings, keep_log=False) as service:
            snapshot = service.registry.snapshot
            tools = [summary(snapshot.tools[tool_id].spec) for tool_id in snapshot.ids]
        if options.json:
            _print_json(tools)
            return 0
        for tool in tools:
            print(f"{tool['tool_id']:<20} {tool['category']:<16} {tool['description'].splitlines()[0]}")
        return 0

    run(listed())


def _tools_export(settings: Settings, options: argparse.Namespace) -> int:
    """What could not be expressed goes to stderr, so that stdout is what the provider takes."""

    async def exported() -> int:
        async with open_service(settings, keep_log=False) as service:
            snapshot = service.registry.snapshot
            found = export((snapshot.tools[tool_id] for tool_id in snapshot.ids), options.format)
        for report in found.reports:
            print(f"{report.tool_id}: {report.reason}{' (left out)' if report.left_out else ''}", file=sys.stderr)
        _print_json(found.tools)
        return 1 if any(report.left_out for report in found.reports) else 0

    run(exported())


def _tools_call(settings: Settings, options: argparse.Namespace) -> int:
    try:
        parameters = orjson.loads(options.parameters)
    except orjson.JSONDecodeError:
        raise SettingsError("the parameters are not valid JSON") from None

    async def called() -> int:
        async with open_service(settings) as service:
            execution = await service.executor.execute(
                ToolCall(new_execution_id(), options.tool, parameters, LOCAL_CALLER, time.perf_counter())
            )
            refusal = execution.refusal
            _print_json(execution.as_dict() if refusal is None else {"error": refusal.as_error()})
        return 0 if execution.status == "success" and refusal is None else 1

    run(called())


def _tools_invalidate(settings: Settings, options: argparse.Namespace) -> int:
    if settings.redis_url is None:
        where = f"DELETE /api/v1/admin/cache/{options.tool}"
        raise SettingsError(f"REDIS_URL: not set, so results are kept in the serving process alone; ask it: {where}")

    async def invalidated() -> int:
        async with open_service(settings, keep_log=False) as service:
            if options.tool not in service.registry.snapshot.tools:
                raise SettingsError(f"there is no tool {options.tool}; `agentcore-tools tools list` shows all")
            try:
                await service.forget_results(options.tool)
            except ConnectionError:
                print("agentcore-tools: Redis is away; nothing was forgotten", file=sys.stderr)
                return 1
        print(f"the kept results of {options.tool} are forgotten")
        return 0

    run(invalidated())


def _migrate(settings: Settings, options: argparse.Namespace) -> int:
    async def migrated() -> int:
        async with opened_database(settings, command_timeout_s=MIGRATION_TIMEOUT_S) as engine:
            await migrate(engine, options.revision)
            if options.revision == NEWEST and engine.dialect.name == "postgresql":
                await _make_months(engine)
            print(f"tables at {await version(engine)}")
        return 0

    run(migrated())


async def _make_months(engine: AsyncEngine) -> None:
    try:
        await ensure_partitions(engine, time.time())
    except (StoreAway, asyncpg.PostgresError) as error:
        message = f"the tables are up to date, but months of the log could not be made ({reason(error)}); run it again"
        raise MigrationError(message) from error


def _keys_create(settings: Settings, options: argparse.Namespace) -> int:
    given = {
        "tenant": options.tenant,
        "subject": options.subject,
        "scopes": options.scope,
        "tools": options.tool,
        "limit_class": options.limit_class,
        "expires_in": options.expires_in,
    }
    try:
        new = NewKey.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise SettingsError("\n".join(_argument_problem(detail) for detail in error.errors())) from None

    async def created() -> int:
        async with opened_keys(settings) as keys:
            key, credential = await keys.create(new)
            try:
                show(key.id, credential)
            except OSError as error:  # nobody has seen it
                await keys.revoke(key.id)
                raise OSError(error.errno, f"{error.strerror}; the key {key.id} is revoked") from error
        return 0

    def show(key_id: str, credential: str) -> None:
        if options.json:
            _print_json({"id": key_id, "key": credential})
        else:
            text = f"id   {key_id}\nkey  {credential}\nThe key is shown this once; send it as Authorization: Bearer."
            print(text, flush=True)

    run(created())


def _argument_problem(detail: Any) -> str:
    argument = {"scopes": "--scope", "tools": "--tool", "limit_class": "--class", "expires_in": "--expires-in"}
    name = str(detail["loc"][0])
    says = LIFE_RULE if name == "expires_in" else detail["msg"].removeprefix("Value error, ")
    return f"{argument.get(name, f'--{name}')}: {says}"


def _keys_list(settings: Settings, options: argparse.Namespace) -> int:
    async def listed() -> int:
        async with opened_keys(settings) as keys:
            found = [key async for key in keys.all()]
        if options.json:
            _print_json([key.shown() for key in found])
            return 0
        for key in found:
            who, may = f"{key.caller.tenant}/{key.caller.subject}", " ".join(sorted(key.caller.scopes))
            print(f"{key.id}  {key.state(time.time()):<8} {who:<32} {may}")
        return 0

    run(listed())


def _keys_revoke(settings: Settings, options: argparse.Namespace) -> int:
    async def revoked() -> int:
        async with opened_keys(settings) as keys:
            key = await keys.revoke(options.id)
        if key is None:
            print("agentcore-tools: no such key; keys list shows them", file=sys.stderr)
            return 1
        if options.json:
            _print_json(key.shown())
        else:
            print(f"{key.id} is revoked; every replica refuses it within 5 s")
        return 0

    run(revoked())


@contextlib.asynccontextmanager
async def opened_keys(settings: Settings) -> AsyncIterator[KeyStore]:
    """The keys and nothing else, beside a service that runs or alone."""
    async with opened_database(settings) as engine:
        if engine.dialect.name == "sqlite":
            await migrate(engine)
        elif not await is_current(engine):
            raise MigrationError("the database has no tables yet, or old ones; run agentcore-tools migrate")
        yield KeyStore(engine)


@contextlib.asynccontextmanager
async def opened_database(settings: Settings, **options: float) -> AsyncIterator[AsyncEngine]:
    engine = create_engine(settings.database_url, 1, 0, **options)
    try:
        yield engine
    finally:
        await close_engine(engine)


def _doctor(settings: Settings, options: argparse.Namespace) -> int:
    async def examined() -> int:
        try:
            async with open_service(settings, keep_log=False) as service:
                findings = await examine(service, options.host, options.port)
        except SettingsError as error:
            return _doctor_refused(error, options)
        return _print_findings(findings, options)

    run(examined())


def _doctor_refused(error: SettingsError, options: argparse.Namespace) -> int:
    return _print_findings(examine_refused(error, options.host, options.port), options)


def _print_findings(findings: Sequence[Finding], options: argparse.Namespace) -> int:
    if options.json:
        shown = [finding._replace(what=_legible(finding.what), says=_legible(finding.says)) for finding in findings]
        _print_json([finding._asdict() for finding in shown])
    else:
        for finding in findings:
            print(f"{'ok ' if finding.ok else 'BAD'}  {finding.what}: {finding.says}")
    return 0 if all(finding.ok for finding in findings) else 1


def _legible(text: str) -> str:
    """What JSON can hold: a path or a setting may have bytes that are no UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def _print_json(value: Any) -> None:
    sys.stdout.buffer.write(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    sys.stdout.flush()
