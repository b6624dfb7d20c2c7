"""Arithmetic on real numbers in which every operation ends at once.

Whole numbers stay whole and exact up to a bound that is checked before the work is done; the rest is IEEE 754.
Whatever has no finite real result is a ToolError with a stable code. Knows no grammar and no tool.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import NamedTuple, Never

from app.errors import ToolError

Number = int | float

INTEGER_BITS_MAX = 1_329
"""400 decimal digits: past the largest float (309 digits), so that 170! and its quotients are exact."""

FACTORIAL_MAX = 170
"""171! is past the largest float, and so past what JSON readers take."""

ROUND_DIGITS_MAX = 400
"""round(5, -10**9) would build a power of ten with a billion digits."""


def apply(operation: Callable[..., Number], *operands: Number) -> Number:
    """The finite real result, or ToolError: DIVISION_BY_ZERO, TOO_LARGE, OUT_OF_DOMAIN, COMPLEX_RESULT, NOT_FINITE."""
    try:
        value = operation(*operands)
    except ZeroDivisionError:
        raise ToolError("Division by zero has no result", code="DIVISION_BY_ZERO") from None
    except OverflowError:
        _too_large()
    except (ValueError, TypeError):  # math: "domain error"; gcd of a fraction
        raise ToolError("A function does not take this value", code="OUT_OF_DOMAIN") from None
    return _finite(value)


def as_json_number(value: Number) -> Number:
    """Whole numbers past 64 bits become the nearest float."""
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return apply(float, value)
    return value


def _finite(value: Number) -> Number:
    if isinstance(value, int):
        if value.bit_length() > INTEGER_BITS_MAX:
            _too_large()
    elif math.isinf(value):
        _too_large()
    elif math.isnan(value):
        raise ToolError("The result is not a number", code="NOT_FINITE")
    return value


def _too_large() -> Never:
    raise ToolError("The result is too large", code="TOO_LARGE")


def divide(a: Number, b: Number) -> Number:
    """Two whole numbers that divide evenly give a whole number: 6 / 3 is 2, 7 / 2 is 3.5."""
    if isinstance(a, int) and isinstance(b, int) and a % b == 0:
        return a // b
    return a / b


def power(base: Number, exponent: Number) -> Number:
    if isinstance(base, int) and isinstance(exponent, int) and exponent >= 0:
        # A number of n bits to the k-th has more than (n - 1) * k bits; the digits are known before they are computed.
        if (abs(base).bit_length() - 1) * exponent > INTEGER_BITS_MAX:
            _too_large()
        return int(base**exponent)
    if base < 0 and not float(exponent).is_integer():
        raise ToolError("A negative number to a fractional power is not real", code="COMPLEX_RESULT")
    result: float = float(base) ** float(exponent)
    return result


def square_root(value: Number) -> float:
    if value < 0:
        raise ToolError("The square root of a negative number is not real", code="COMPLEX_RESULT")
    return math.sqrt(value)


def logarithm(value: Number, base: Number = math.e) -> float:
    """Exact for whole powers of whole bases: as a quotient of two logarithms, log(1000, 10) is 2.9999999999999996."""
    if base in (2, 10):
        return math.log2(value) if base == 2 else math.log10(value)
    quotient = math.log(value) if base == math.e else math.log(value, base)
    exponent = round(abs(quotient))
    if isinstance(value, int) and isinstance(base, int) and base > 1 and base**exponent == value:
        return float(exponent)
    return quotient


def factorial(value: Number) -> int:
    if value > FACTORIAL_MAX:
        _too_large()
    return math.factorial(_whole(value))


def round_to(value: Number, digits: Number = 0) -> Number:
    """Halves go to the even neighbour: 2.5 to 2, 3.5 to 4. Without digits the result is a whole number."""
    places = _whole(digits)
    if abs(places) > ROUND_DIGITS_MAX:
        raise ValueError("digits")
    return round(value, places) if places else round(value)


def greatest_common_divisor(a: Number, b: Number) -> int:
    return math.gcd(_whole(a), _whole(b))


def _whole(value: Number) -> int:
    """The integer that a whole number is, 5.0 too. Raises ValueError for fractions."""
    if isinstance(value, float) and not value.is_integer():
        raise ValueError("not whole")
    return int(value)


class Function(NamedTuple):
    """A function of the grammar and how many arguments it takes."""

    compute: Callable[..., Number]
    arguments_min: int = 1
    arguments_max: int = 1


MANY = 100
"""Arguments of min, max and hypot; the bound on the whole expression comes first."""

FUNCTIONS = {
    "sqrt": Function(square_root),
    "cbrt": Function(math.cbrt),
    "abs": Function(abs),
    "round": Function(round_to, 1, 2),
    "floor": Function(math.floor),
    "ceil": Function(math.ceil),
    "trunc": Function(math.trunc),
    "min": Function(min, 2, MANY),
    "max": Function(max, 2, MANY),
    "sin": Function(math.sin),
    "cos": Function(math.cos),
    "tan": Function(math.tan),
    "asin": Function(math.asin),
    "acos": Function(math.acos),
    "atan": Function(math.atan),
    "atan2": Function(math.atan2, 2, 2),
    "sinh": Function(math.sinh),
    "cosh": Function(math.cosh),
    "tanh": Function(math.tanh),
    "log": Function(logarithm, 1, 2),
    "ln": Function(math.log),
    "log2": Function(math.log2),
    "log10": Function(math.log10),
    "exp": Function(math.exp),
    "factorial": Function(factorial),
    "gcd": Function(greatest_common_divisor, 2, 2),
    "hypot": Function(math.hypot, 2, MANY),
    "degrees": Function(math.degrees),
    "radians": Function(math.radians),
}

CONSTANTS = {"pi": math.pi, "e": math.e, "tau": math.tau}

OPERATIONS: dict[str, Callable[[Number, Number], Number]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": divide,
    "power": power,
    "modulo": operator.mod,
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": divide,
    "**": power,
    "^": power,
    "%": operator.mod,
}
"""By name and by sign. Modulo has the sign of its second operand, as in Python: -7 % 3 is 2."""
