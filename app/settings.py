"""Every setting once: its unit, default, bound and reason. Read by the composition root and the command line alone.

A setting is an environment variable of the same name in capitals, or a line in `.env`; the environment wins, then
`.env`, then the profile, then the default. docs/settings.md shows them all; a test holds both together.
"""

from __future__ import annotations

import io
import ipaddress
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from dotenv import dotenv_values
from dotenv.parser import parse_stream
from pydantic import (
    AfterValidator,
    AnyHttpUrl,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)

from app.database_url import parse_database_url, with_whole_path


class SettingsError(ValueError):
    """A setting that cannot be: names the variable and its bound, never its value, which may be a secret."""


def _items(value: Any) -> Any:
    """A comma list as a tuple; blanks around items and empty items do not count."""
    if isinstance(value, str):
        return tuple(item.strip() for item in value.split(",") if item.strip())
    return value


def _web_url(value: str) -> str:
    if not value.startswith(("http://", "https://")):
        raise ValueError("must start with http:// or https://")
    try:
        _ANY_URL.validate_python(value)
        host = urlsplit(value).hostname
    except ValueError:
        host = None
    if not host:
        raise ValueError("must be http:// or https://, a host, perhaps a port, perhaps a path")
    return value.rstrip("/")


_ANY_URL = TypeAdapter(AnyHttpUrl)

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?")
"""As browsers write it (RFC 6454, section 6.2): compared letter by letter, so that nothing else could ever match."""


def _origins(values: tuple[str, ...]) -> tuple[str, ...]:
    if not all(value == "*" or _ORIGIN.fullmatch(value) for value in values):
        raise ValueError("must be * or origins as browsers send them: scheme://host[:port] in lower case, no path")
    return values


def _proxies(values: tuple[str, ...]) -> tuple[str, ...]:
    if values != ("*",) and not all(map(_is_network, values)):
        raise ValueError("must be IP addresses and networks, or * alone")
    return values


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True


CommaList = Annotated[tuple[str, ...], BeforeValidator(_items)]
Origins = Annotated[CommaList, AfterValidator(_origins)]
Proxies = Annotated[CommaList, AfterValidator(_proxies)]
WebUrl = Annotated[str, AfterValidator(_web_url)]


def _database_url(value: str) -> str:
    parse_database_url(value)
    return with_whole_path(value)


REDIS_SCHEMES = ("redis", "rediss", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")


def _redis_url(value: str) -> str:
    scheme, _, rest = value.partition("://")
    if scheme not in REDIS_SCHEMES or not rest:
        raise ValueError(f"must start with one of {', '.join(f'{one}://' for one in REDIS_SCHEMES)}, then a host")
    return value


def _path_or_url(value: str) -> str:
    return value if "://" in value else str(Path(value).absolute())


WholePath = Annotated[Path, AfterValidator(Path.absolute)]
"""As it is where the process starts: a tool may change the working directory, and of a database in another one the safe
default would say that there are no keys."""

DatabaseUrl = Annotated[str, AfterValidator(_database_url)]
RedisUrl = Annotated[str, AfterValidator(_redis_url)]
PathOrUrl = Annotated[str, AfterValidator(_path_or_url)]

JwtAlgorithm = Literal[
    "HS256", "HS384", "HS512", "RS256", "RS384", "RS512", "ES256", "ES384", "ES512", "PS256", "PS384", "PS512", "EdDSA"
]
JwtAlgorithms = Annotated[tuple[JwtAlgorithm, ...], BeforeValidator(_items)]


class Settings(BaseModel):
    """All settings of one process, checked."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    profile: Literal["default", "high-throughput", "low-latency", "constrained"] = Field(
        "default", description="A named set of defaults; single variables still override"
    )
    auth_mode: Literal["auto", "required", "none"] = Field(
        "auto", description="auto: off on loopback while there is neither a key nor JWT; none: off anywhere, said aloud"
    )
    database_url: DatabaseUrl = Field(
        "sqlite+aiosqlite:///./var/agentcore.db",
        validate_default=True,
        description="Keys and log: a SQLite file, or postgresql+asyncpg://",
    )
    database_pool_size: int = Field(10, ge=1, le=1_000, description="PostgreSQL connections that are kept open")
    database_max_overflow: int = Field(10, ge=0, le=1_000, description="PostgreSQL connections beyond these, when busy")
    redis_url: RedisUrl | None = Field(
        None,
        description="Limits of all replicas together: redis://, redis+sentinel:// or redis+cluster://; rediss for TLS",
    )
    redis_pool_size: int = Field(
        50, ge=1, le=10_000, description="Connections to Redis for idempotency keys and kept results; limits have one"
    )
    keys_stale_s: float = Field(
        600.0, ge=0, le=86_400, description="Seconds that known API keys stay good while the database is away"
    )
    jwt_issuer: str | None = Field(None, description="The only `iss` that is taken; turns JWT on with the next four")
    jwt_audience: str | None = Field(None, description="The `aud` that a token must name")
    jwt_algorithms: JwtAlgorithms = Field(
        (), description="Algorithms that are taken, comma separated: HS* with a secret, else RS*, PS*, ES*, EdDSA"
    )
    jwt_secret: str | None = Field(None, description="Secret of HS* tokens, at least 32 bytes")
    jwt_jwks: PathOrUrl | None = Field(None, description="Public keys of the issuer: path or URL of a JWKS document")
    jwt_tenant_claim: str = Field("tenant", min_length=1, description="Claim that names the tenant")
    jwt_scope_claim: str = Field("scope", min_length=1, description="Claim with the scopes, a list or words in a text")
    limits_file: WholePath | None = Field(None, description="YAML or JSON file of limit policies")
    limits_rate: str | None = Field(None, description="Rate of each subject over all tools, as 600/minute")
    limits_quota_daily: int | None = Field(None, ge=1, le=10**12, description="Calls of each tenant in a UTC day")
    limits_quota_monthly: int | None = Field(None, ge=1, le=10**12, description="Calls of each tenant in a UTC month")
    limits_timeout_ms: int = Field(
        50, ge=1, le=10_000, description="Milliseconds in which Redis must answer; after them it is away"
    )
    limits_expected_replicas: int = Field(
        2, ge=1, le=10_000, description="Replicas that share a limit: each keeps its part of it while Redis is away"
    )
    enable_database_logging: bool = Field(True, description="false: no journal and no rows of executions")
    journal_dir: WholePath = Field(
        Path("./var/journal"),
        validate_default=True,
        description="Folder of the journal; each process has a folder of its own in it",
    )
    journal_mode: Literal["durable", "strict", "buffered"] = Field(
        "durable", description="Before an answer leaves: written (durable), written and fsynced (strict), nothing"
    )
    journal_max_bytes: int = Field(
        1_073_741_824,
        ge=1_048_576,
        le=1_099_511_627_776,
        description="Bytes of rows that wait for the database; no room: calls are refused (buffered: rows dropped)",
    )
    log_payloads: Literal["off", "metadata", "full"] = Field(
        "metadata", description="Of parameters and results: nothing, size and SHA-256, or the redacted content too"
    )
    log_payload_bytes: int = Field(
        4096, ge=64, le=1_048_576, description="Bytes of one payload that a row keeps; the rest is cut"
    )
    log_retention_days: int = Field(90, ge=1, le=36_500, description="Days after which months of rows are dropped")
    tool_execution_timeout: float = Field(
        30.0, gt=0, le=3600, description="Seconds that one run, or one plan, may take at most"
    )
    max_concurrent_executions: int = Field(
        1500, ge=1, le=100_000, description="Calls that run at once; as many again may wait, for 1 s"
    )
    adaptive_concurrency: Literal["off", "shadow", "enforce"] = Field(
        "shadow", description="Whether that limit, and adaptive rates, follow the load: computed and shown, or holding"
    )
    max_request_bytes: int = Field(
        1_048_576, ge=1024, le=67_108_864, description="Bytes of a request body; over it 413"
    )
    max_request_bytes_in_flight: int = Field(
        268_435_456,
        ge=1_048_576,
        le=68_719_476_736,
        description="Bytes of bodies over 32 KiB whose requests have not ended; past it, or past a tenant's part, 503",
    )
    max_response_bytes_in_flight: int = Field(
        268_435_456,
        ge=1_048_576,
        le=68_719_476_736,
        description="Bytes of all answers that their clients leave unread; past it who has read nothing longest is cut",
    )
    max_result_bytes: int = Field(
        1_048_576, ge=1024, le=67_108_864, description="Bytes of a tool's result as JSON; over it the run failed"
    )
    enable_circuit_breakers: bool = Field(
        True, description="false: tools and origins that fail again and again are asked all the same"
    )
    result_cache_bytes: int = Field(
        67_108_864, ge=0, le=68_719_476_736, description="Bytes of kept results of tools in this process; 0 keeps none"
    )
    enable_result_compression: bool = Field(
        False, description="true: results of 2 KB and more are compressed on their way to Redis"
    )
    max_batch_size: int = Field(100, ge=1, le=10_000, description="Requests of a JSON-RPC batch, calls of a plan")
    request_read_timeout_s: float = Field(
        10.0, gt=0, le=300, description="Seconds in which a request's headers, then its body, must arrive"
    )
    protocol_lane: bool = Field(
        True, description="false: every request goes through ASGI, those of the doors of calls too; for comparison"
    )
    drain_seconds: float = Field(
        5.0, ge=0, le=300, description="Seconds to go on serving after SIGTERM, while endpoints are removed"
    )
    http_connection_pool_size: int = Field(
        100, ge=1, le=10_000, description="Outgoing connections that tools may hold at once"
    )
    enable_tracing: bool = Field(True, description="false: no traces, neither taken over from requests nor passed on")
    trace_sample_ratio: float = Field(
        0.01, ge=0, le=1, description="Part of the calls that are traced, where the caller has not decided it"
    )
    enable_parameter_validation_cache: bool = Field(
        True, description="false builds a tool's validator on every call: for debugging"
    )
    enable_registry_cache: bool = Field(True, description="false builds list answers on every call: for debugging")
    tool_modules: CommaList = Field((), description="Python modules with tools, comma separated")
    cors_allow_origins: Origins = Field(
        (), description="Browser origins besides our own that may call, comma separated"
    )
    public_url: WebUrl | None = Field(None, description="Where clients reach the service, for its documents")
    forwarded_allow_ips: Proxies = Field(
        (), description="Proxies whose X-Forwarded-Proto is believed: addresses, networks or *, comma separated"
    )
    mcp_tolerate_header_mismatch: bool = Field(
        False, description="true: MCP messages of 2026-07-28 may come under the header of an older version"
    )
    egress_allow: CommaList = Field(
        (), description="Hosts or networks that tools may reach though egress refuses them, each with optional :port"
    )
    wikipedia_url: WebUrl = Field("https://en.wikipedia.org/w/api.php", description="MediaWiki API of wikipedia_search")
    searxng_url: WebUrl | None = Field(None, description="SearXNG-compatible endpoint of web_search")
    access_log_ratio: float = Field(
        0.0, ge=0, le=1, description="Part of the HTTP requests that get an access line; 0: none, 1: all"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Least level that is logged")


PROFILES: dict[str, dict[str, Any]] = {
    "default": {},
    "high-throughput": {
        "database_pool_size": 20,
        "database_max_overflow": 20,
        "redis_pool_size": 50,
        "http_connection_pool_size": 100,
        "tool_execution_timeout": 30.0,
    },
    "low-latency": {
        "database_pool_size": 50,
        "redis_pool_size": 100,
        "enable_parameter_validation_cache": True,
        "enable_registry_cache": True,
        "enable_result_compression": False,
    },
    "constrained": {
        "database_pool_size": 5,
        "database_max_overflow": 5,
        "redis_pool_size": 10,
        "http_connection_pool_size": 20,
        "max_concurrent_executions": 500,
        "max_request_bytes_in_flight": 67_108_864,
        "max_response_bytes_in_flight": 67_108_864,
        "result_cache_bytes": 8_388_608,
    },
}
"""Defaults by profile; only what differs, or what the profile promises to hold, is named."""

_NAMES = {name.upper(): name for name in Settings.model_fields}


def read_settings(environ: Mapping[str, str], dotenv: Path | None = None, **given: Any) -> Settings:
    """Settings of this process. `given` comes from the command line and wins. Raises SettingsError."""
    values: dict[str, Any] = {}
    for source in (_lines_of(dotenv) if dotenv is not None else {}, environ):
        values.update({_NAMES[name]: value for name, value in source.items() if name in _NAMES and value})
    values.update({name: value for name, value in given.items() if value is not None})
    profile = PROFILES.get(str(values.get("profile", "default")), {})
    try:
        return Settings(**{**profile, **values})
    except ValidationError as error:
        raise SettingsError("\n".join(_problem(detail) for detail in error.errors(include_url=False))) from None


def otel_variables(dotenv: Path) -> dict[str, str]:
    """The OTEL_* lines of `.env`. OpenTelemetry reads the environment itself, so that is where they must go."""
    return {name: value for name, value in _lines_of(dotenv).items() if name.startswith("OTEL_") and value}


def _lines_of(dotenv: Path) -> Mapping[str, str | None]:
    try:
        text = dotenv.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise SettingsError(f"{dotenv.name}: must be text in UTF-8") from None
    except (FileNotFoundError, IsADirectoryError):  # as some call their virtual environment
        return {}
    except OSError as error:
        raise SettingsError(f"{dotenv.name}: cannot be read ({error.strerror})") from None
    if problems := [*_unreadable_lines(dotenv.name, text)]:
        raise SettingsError("\n".join(problems))
    return dotenv_values(stream=io.StringIO(text))


def _unreadable_lines(file: str, text: str) -> Iterator[str]:
    """Lines of ours that python-dotenv would leave out, as one without an end of its quotes. Lines for others may be
    whatever they are."""
    for line in parse_stream(io.StringIO(text)):
        found = _NAME_OF_A_LINE.match(line.original.string) if line.error else None
        if found and (found[1] in _NAMES or found[1].startswith("OTEL_")):
            where = f"line {line.original.line} of {file} cannot be read"
            yield f"{found[1]}: {where}; write {found[1]}=value, with quotes around the whole value or none"


_NAME_OF_A_LINE = re.compile(r"\s*(?:export\s+)?'?([A-Z][A-Z0-9_]*)")


def _problem(detail: Any) -> str:
    name = str(detail["loc"][0])
    return f"{name.upper()}: {_reason(detail)}. {Settings.model_fields[name].description}"


def _reason(detail: Any) -> str:
    reason: str = detail["msg"].removeprefix("Value error, ")
    return reason[0].lower() + reason[1:]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listener on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def http_url(host: str, port: int) -> str:
    """Where a listener answers; an IPv6 address goes into brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def has_jwt(settings: Settings) -> bool:
    """Whether anything was said of tokens: then somebody means to be asked for one."""
    return bool(
        settings.jwt_issuer
        or settings.jwt_audience
        or settings.jwt_algorithms
        or settings.jwt_secret
        or settings.jwt_jwks
    )


def check_bind(settings: Settings, host: str, keys_exist: bool | None) -> None:
    """The safe default: another address than loopback needs authentication, or AUTH_MODE=none said aloud.

    `keys_exist` is None where that could not be read: authentication is on then.
    """
    if settings.auth_mode == "auto" and keys_exist is False and not has_jwt(settings) and not is_loopback(host):
        raise SettingsError(
            "AUTH_MODE: auto serves without authentication on loopback only, and this address is not loopback. "
            "Make a key (agentcore-tools keys create --tenant T --subject S) or set JWT_*, bind 127.0.0.1, "
            "or set AUTH_MODE=none to serve everyone who can reach it"
        )
