"""Tools that need nothing but the process: echo, calculator and clock.

Docstrings and descriptions are what language models read to choose and to call; they are short on purpose.
"""

from __future__ import annotations

import time
from datetime import datetime
from functools import cache
from importlib.resources import files
from typing import Annotated, Literal
from zoneinfo import ZoneInfo

from pydantic import Field, WithJsonSchema
from typing_extensions import TypedDict

from app.tools.builtin.arithmetic import OPERATIONS, Number, apply, as_json_number
from app.tools.builtin.expression import LENGTH_MAX, evaluate
from app.tools.tool import ToolError, tool

Operation = Literal[
    "add", "subtract", "multiply", "divide", "power", "modulo", "+", "-", "*", "/", "**", "^", "%"
]  # fmt: skip
Real = Annotated[Number, WithJsonSchema({"type": "number"})]
"""An int or a float as it came, where `float` alone would round whole numbers past 53 bits."""


class EchoResult(TypedDict):
    message: str


class CalculatorResult(TypedDict):
    value: Real


class TimeResult(TypedDict):
    time: str | int
    timezone: str


@tool(category="utility", tags=["text", "test"], capabilities=["echo"], timeout=5.0, read_only=True, idempotent=True)
async def echo(
    message: Annotated[str, Field(max_length=10_000, description="Text to return")],
    uppercase: Annotated[bool, Field(description="Return it in upper case")] = False,
) -> EchoResult:
    """Return the message."""
    return {"message": message.upper() if uppercase else message}


@tool(
    category="utility",
    tags=["math", "arithmetic", "numbers"],
    capabilities=["calculation"],
    timeout=5.0,
    read_only=True,
    idempotent=True,
)
async def calculator(
    operation: Annotated[Operation | None, Field(description="Operation on a and b; ^ and ** are power")] = None,
    a: Annotated[Real | None, Field(description="First operand")] = None,
    b: Annotated[Real | None, Field(description="Second operand")] = None,
    expression: Annotated[
        str | None,
        Field(max_length=LENGTH_MAX, description="Arithmetic such as (1 + 2) * sqrt(9) / pi; instead of operation"),
    ] = None,
) -> CalculatorResult:
    """Compute with numbers: either one operation on a and b, or an expression.

    Expressions have + - * / // % ** ^ and brackets, pi, e, tau, and functions such as sqrt, round, min, max, sin,
    log, exp, factorial. Angles are in radians.
    """
    if expression is not None and operation is None and a is None and b is None:
        return {"value": as_json_number(evaluate(expression))}
    if expression is None and operation is not None and a is not None and b is not None:
        return {"value": as_json_number(apply(OPERATIONS[operation], a, b))}
    raise ToolError("Give either operation with both a and b, or expression alone", code="INVALID_ARGUMENTS")


@tool(
    category="utility",
    tags=["time", "date", "clock", "timezone"],
    capabilities=["time"],
    timeout=5.0,
    read_only=True,
    # The answer changes, but to ask twice does no harm, which is what the word means.
    idempotent=True,
)
async def current_time(
    timezone: Annotated[str, Field(max_length=64, description="IANA name, such as Europe/Paris")] = "UTC",
    format: Annotated[
        Literal["iso", "unix", "human"], Field(description="ISO 8601, seconds since 1970, or words")
    ] = "iso",
) -> TimeResult:
    """Tell the current date and time."""
    zone = _zone(timezone)
    now = time.time()
    if format == "unix":
        return {"time": int(now), "timezone": zone.key}
    local = datetime.fromtimestamp(now, zone)
    if format == "human":
        return {"time": local.strftime("%A, %d %B %Y, %H:%M:%S %Z"), "timezone": zone.key}
    return {"time": local.isoformat(timespec="seconds"), "timezone": zone.key}


def _zone(name: str) -> ZoneInfo:
    canonical = _zone_names().get(name.lower())
    if canonical is None:
        raise ToolError("Unknown time zone; use an IANA name such as Europe/Paris or UTC", code="UNKNOWN_TIMEZONE")
    return _loaded(canonical)


@cache
def _zone_names() -> dict[str, str]:
    """Names by their lower case, from the list in the tzdata package: one small file.

    `zoneinfo.available_timezones()` opens some 600. Names are looked up here and never tried as paths.
    """
    names = files("tzdata").joinpath("zones").read_text(encoding="ascii").split()
    return {name.lower(): name for name in names}


@cache
def _loaded(canonical: str) -> ZoneInfo:
    """Kept, at most one for each name in the list; ZoneInfo itself keeps only eight."""
    return ZoneInfo(canonical)


_zone_names()
"""Read with the module, so that no call reads it on the event loop."""
