"""Echo, calculator and clock: what an agent gets, and that no expression can hurt."""

from __future__ import annotations

import asyncio
import math
import re
import time
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from app.errors import InvalidParams
from app.tools.builtin.arithmetic import CONSTANTS, FUNCTIONS, INTEGER_BITS_MAX, apply
from app.tools.builtin.basic import calculator, current_time, echo
from app.tools.builtin.expression import DEPTH_MAX, DIGITS_MAX, LENGTH_MAX, PARTS_MAX, evaluate, parse
from app.tools.tool import FunctionTool, ToolError

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def call(tool: FunctionTool, **parameters: Any) -> Any:
    value = asyncio.run(tool(**tool.parameters.validate(parameters)))
    return orjson.loads(tool.result.encode(value))


def failing(tool: FunctionTool, **parameters: Any) -> str:
    with pytest.raises(ToolError) as caught:
        call(tool, **parameters)
    assert str(caught.value)
    assert not caught.value.retryable
    return caught.value.code


@pytest.mark.parametrize("tool", [echo, calculator, current_time])
def test_every_tool_and_parameter_is_described_and_harmless(tool: FunctionTool) -> None:
    assert tool.spec.read_only
    assert tool.spec.idempotent
    assert tool.spec.category == "utility"
    assert tool.spec.tags
    assert tool.spec.capabilities
    assert all(parameter["description"] for parameter in tool.parameters.json_schema["properties"].values())
    assert tool.result.json_schema is not None
    assert not tool.blocking


# echo


def test_echo_returns_the_message() -> None:
    assert call(echo, message="Grüße\n\u0000") == {"message": "Grüße\n\u0000"}
    assert call(echo, message="straße", uppercase=True) == {"message": "STRASSE"}
    assert call(echo, message="x" * 10_000) == {"message": "x" * 10_000}


@pytest.mark.parametrize("parameters", [{}, {"message": 5}, {"message": "x" * 10_001}, {"message": "", "shout": True}])
def test_echo_refuses_what_its_schema_does_not_have(parameters: dict[str, Any]) -> None:
    with pytest.raises(InvalidParams):
        call(echo, **parameters)


# calculator: operations

OPERATIONS: list[tuple[str, Any, Any, Any]] = [
    ("add", 2, 3, 5),
    ("+", 0.5, 1, 1.5),
    ("subtract", 2, 3, -1),
    ("-", 2.5, 0.5, 2.0),
    ("multiply", 4, 5, 20),
    ("*", 2**40, 2**20, 2**60),
    ("divide", 6, 3, 2),
    ("/", 7, 2, 3.5),
    ("/", 7.0, 3.5, 2.0),
    ("power", 2, 10, 1024),
    ("**", 2, -1, 0.5),
    ("^", 9, 0.5, 3.0),
    ("^", -8.0, 3, -512.0),
    ("modulo", 7, 3, 1),
    ("%", -7, 3, 2),
    ("%", 7.5, 2, 1.5),
    ("add", 2**62, 2**62 + 1, 2**63 + 1),
    ("add", 2**63, 2**63, float(2**64)),
    ("subtract", -(2**63), 1, float(-(2**63))),
]


@pytest.mark.parametrize(("operation", "a", "b", "value"), OPERATIONS)
def test_an_operation_has_its_value_and_its_kind_of_number(operation: str, a: Any, b: Any, value: Any) -> None:
    result = call(calculator, operation=operation, a=a, b=b)["value"]
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("operation", "a", "b", "code"),
    [
        ("divide", 1, 0, "DIVISION_BY_ZERO"),
        ("/", 1.5, 0.0, "DIVISION_BY_ZERO"),
        ("%", 1, 0, "DIVISION_BY_ZERO"),
        ("%", 1.5, 0, "DIVISION_BY_ZERO"),
        ("power", 0, -1, "DIVISION_BY_ZERO"),
        ("power", 0.0, -0.5, "DIVISION_BY_ZERO"),
        ("power", -8, 0.5, "COMPLEX_RESULT"),
        ("power", 10, 309, "TOO_LARGE"),
        ("power", 9, 9**9, "TOO_LARGE"),
        ("power", -9, 2**63, "TOO_LARGE"),
        ("power", 2.5, 1e300, "TOO_LARGE"),
        ("multiply", 1e300, 1e300, "TOO_LARGE"),
        ("add", 1.7e308, 1.7e308, "TOO_LARGE"),
        ("divide", 1e300, 1e-300, "TOO_LARGE"),
    ],
)
def test_what_is_no_finite_real_number_fails_with_its_reason(operation: str, a: Any, b: Any, code: str) -> None:
    assert failing(calculator, operation=operation, a=a, b=b) == code


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"operation": "add"},
        {"operation": "add", "a": 1},
        {"operation": "add", "b": 1},
        {"a": 1, "b": 2},
        {"expression": "1", "a": 1},
        {"expression": "1", "operation": "add"},
        {"expression": "1", "operation": "add", "a": 1, "b": 2},
    ],
)
def test_the_two_forms_are_neither_mixed_nor_half_given(parameters: dict[str, Any]) -> None:
    assert failing(calculator, **parameters) == "INVALID_ARGUMENTS"


@pytest.mark.parametrize(
    "parameters",
    [
        {"operation": "root", "a": 1, "b": 2},
        {"operation": "add", "a": "1", "b": 2},
        {"operation": "add", "a": True, "b": 2},
        {"expression": 5},
        {"expression": "1" * (LENGTH_MAX + 1)},
    ],
)
def test_operands_are_strict_numbers(parameters: dict[str, Any]) -> None:
    with pytest.raises(InvalidParams):
        call(calculator, **parameters)


# calculator: expressions

EXPRESSIONS: list[tuple[str, Any]] = [
    ("1", 1),
    (" 1 + 2 * 3\n", 7),
    ("(1 + 2) * 3", 9),
    ("1 - 2 - 3", -4),
    ("2 ** 3 ** 2", 512),
    ("2 ^ 3 ^ 2", 512),
    ("-2 ** 2", -4),
    ("(-2) ** 2", 4),
    ("2 ** -1", 0.5),
    ("2 ** -2 ** 2", 0.0625),
    ("--2", 2),
    ("-+-2", 2),
    ("3 - -2", 5),
    ("2 * -3", -6),
    ("-7 // 2", -4),
    ("-7 % 3", 2),
    ("7 // 2 * 2 + 7 % 2", 7),
    ("8 / 4 / 2", 1),
    ("1 / 4", 0.25),
    (".5 + 5.", 5.5),
    ("1e3", 1000.0),
    ("1.5E-3", 0.0015),
    ("2e", None),
    ("pi", math.pi),
    ("PI + e + tau", math.pi + math.e + math.tau),
    ("sqrt(16)", 4.0),
    ("cbrt(-27)", -3.0),
    ("abs(-3)", 3),
    ("round(2.5)", 2),
    ("round(2.567, 2)", 2.57),
    ("round(1234, -2)", 1200),
    ("floor(-1.5) + ceil(1.2) + trunc(-1.7)", -1),
    ("min(3, 1, 2) + max(3, 1, 2)", 4),
    ("sin(0) + cos(0) + tan(0)", 1.0),
    ("asin(1) + acos(1) + atan(0)", math.pi / 2),
    ("atan2(1, 1)", math.pi / 4),
    ("sinh(0) + cosh(0) + tanh(0)", 1.0),
    ("log(e)", 1.0),
    ("ln(e)", 1.0),
    ("log(8, 2)", 3.0),
    ("log(1000, 10)", 3.0),
    ("log(1000.0, 10.0)", 3.0),
    ("log(243, 3)", 5.0),
    ("log(125, 5)", 3.0),
    ("log(7 ** 400, 7)", 400.0),
    ("log(5, 0.5)", math.log(5, 0.5)),
    ("log(10, 3)", math.log(10, 3)),
    ("log2(8) + log10(100)", 5.0),
    ("exp(0)", 1.0),
    ("factorial(5)", 120),
    ("factorial(5.0)", 120),
    ("factorial(170) / factorial(169)", 170),
    ("gcd(12, 18.0)", 6),
    ("hypot(3, 4)", 5.0),
    ("hypot(1, 2, 2)", 3.0),
    ("degrees(pi) + radians(0)", 180.0),
    ("10 ** 399 / 10 ** 399", 1),
    ("(-1) ** (10 ** 300)", 1),
    ("0 ** 0", 1),
]


@pytest.mark.parametrize(("text", "value"), EXPRESSIONS)
def test_expressions_follow_mathematics(text: str, value: Any) -> None:
    if value is None:
        assert failing(calculator, expression=text) == "INVALID_EXPRESSION"
        return
    result = call(calculator, expression=text)["value"]
    assert result == pytest.approx(value, rel=1e-15)
    assert type(result) is type(value)


def test_every_function_is_tried_above() -> None:
    tried = " ".join(text for text, _ in EXPRESSIONS)
    assert [name for name in FUNCTIONS if f"{name}(" not in tried] == []


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("1 / 0", "DIVISION_BY_ZERO"),
        ("1 // 0", "DIVISION_BY_ZERO"),
        ("1 % (2 - 2)", "DIVISION_BY_ZERO"),
        ("0 ** -1", "DIVISION_BY_ZERO"),
        ("log(2, 1)", "DIVISION_BY_ZERO"),
        ("sqrt(-1)", "COMPLEX_RESULT"),
        ("(-8) ** (1 / 3)", "COMPLEX_RESULT"),
        ("log(0)", "OUT_OF_DOMAIN"),
        ("log(-1)", "OUT_OF_DOMAIN"),
        ("asin(2)", "OUT_OF_DOMAIN"),
        ("factorial(-1)", "OUT_OF_DOMAIN"),
        ("factorial(1.5)", "OUT_OF_DOMAIN"),
        ("gcd(1.5, 2)", "OUT_OF_DOMAIN"),
        ("round(5, 0.5)", "OUT_OF_DOMAIN"),
        ("round(5, -999999999)", "OUT_OF_DOMAIN"),
        ("round(5, 10 ** 300)", "OUT_OF_DOMAIN"),
        ("factorial(171)", "TOO_LARGE"),
        ("factorial(10 ** 300)", "TOO_LARGE"),
        ("9 ** 9 ** 9", "TOO_LARGE"),
        ("1e999", "TOO_LARGE"),
        ("10 ** 300 * 1.5 * 1e300", "TOO_LARGE"),
        ("10 ** 350 + 0.5", "TOO_LARGE"),
        ("10 ** 309", "TOO_LARGE"),
        ("exp(1000)", "TOO_LARGE"),
        ("sin(10 ** 350)", "TOO_LARGE"),
    ],
)
def test_an_expression_without_a_finite_real_value_fails_with_its_reason(text: str, code: str) -> None:
    assert failing(calculator, expression=text) == code


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("", 1),
        ("   ", 4),
        ("1 +", 4),
        ("1 1", 3),
        ("2(3)", 2),
        ("(1", 3),
        ("1)", 2),
        ("()", 2),
        ("1 + * 2", 5),
        ("secret + 1", 1),
        ("1 + secret(2)", 5),
        ("sqrt", 5),
        ("sqrt 4", 6),
        ("sqrt()", 6),
        ("min(1)", 1),
        ("atan2(1, 2, 3)", 1),
        ("pi(1)", 3),
        ("1, 2", 2),
        ("1 = 1", 3),
        ("'secret'", 1),
        ("1 # secret", 3),
        ("٣ + 1", 1),
        ("1 × 2", 3),
    ],
)
def test_a_malformed_expression_is_refused_where_it_goes_wrong(text: str, position: int) -> None:
    with pytest.raises(ToolError) as caught:
        evaluate(text)
    assert caught.value.code == "INVALID_EXPRESSION"
    assert str(caught.value).startswith(f"Invalid expression at position {position}: ")
    assert "secret" not in str(caught.value)


class Exact:
    """A number under Python's own parser: its precedence, with our rule for whole quotients."""

    def __init__(self, value: int | float) -> None:
        self.value = value

    def __neg__(self) -> Exact:
        return Exact(-self.value)

    def __pos__(self) -> Exact:
        return self

    def __add__(self, other: Exact) -> Exact:
        return Exact(self.value + other.value)

    def __sub__(self, other: Exact) -> Exact:
        return Exact(self.value - other.value)

    def __mul__(self, other: Exact) -> Exact:
        return Exact(self.value * other.value)

    def __floordiv__(self, other: Exact) -> Exact:
        return Exact(self.value // other.value)

    def __mod__(self, other: Exact) -> Exact:
        return Exact(self.value % other.value)

    def __truediv__(self, other: Exact) -> Exact:
        whole = isinstance(self.value, int) and isinstance(other.value, int) and self.value % other.value == 0
        return Exact(self.value // other.value if whole else self.value / other.value)

    def __pow__(self, other: Exact) -> Exact:
        if abs(other.value) > 1_000 and abs(self.value) > 1:
            raise OverflowError
        return Exact(self.value**other.value)


def _joined(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    operators = st.sampled_from([" + ", " - ", "*", "/", "//", "%", " ** "])
    chain = st.lists(st.tuples(operators, parts), min_size=1, max_size=3)
    return st.one_of(
        st.builds(lambda first, rest: first + "".join(map("".join, rest)), parts, chain),
        st.builds("({})".format, parts),
        st.builds("-{}".format, parts),
        st.builds("+ {}".format, parts),
    )


numbers = st.integers(0, 20).map(str) | st.sampled_from(["0.5", "1.25", "2.", ".75", "1e2", "3E-1"])
python_expressions = st.recursive(numbers.map("N({})".format), _joined, max_leaves=12)


@unhurried
@given(python_expressions)
@example("-N(2)**N(2)")
@example("N(2)**-N(1)**N(3)")
def test_the_grammar_is_that_of_python(text: str) -> None:
    try:
        expected = eval(text, {"N": Exact}).value
    except (ZeroDivisionError, OverflowError, TypeError):  # TypeError: operations that complex numbers lack
        expected = None
    ours = re.sub(r"N\(([^()]+)\)", r"\1", text)
    try:
        value = evaluate(ours)
    except ToolError as error:
        assert error.code != "INVALID_EXPRESSION"
        assert expected is None or isinstance(expected, complex) or abs(expected) > 1e300 or _overflows(text)
    else:
        assert value == expected
        assert evaluate(ours.replace("**", "^")) == value


def _overflows(text: str) -> bool:
    """Whether a part of it may have passed our bounds on the way to a small result."""
    return "**" in text


HOSTILE = [
    "9**9**9**9",
    "9^9^9^9^9",
    "2**2**2**2**2**2**2**2",
    "10**10**10",
    "(-9)**9**9",
    "9**-9**9",
    "9.9**9.9**9.9**9.9",
    "0**9**9**9",
    "1**9**9**9",
    "(9**99)**(9**99)",
    "factorial(factorial(factorial(9)))",
    "factorial(99999999999)",
    "factorial(1e308)",
    "gcd(9**400, 9**401)",
    "round(9**400, -9**400)",
    "round(1e308, 400)",
    "floor(1e308) * floor(1e308)",
    "hypot(" + ",".join("9" * 99) + ")",
    "max(" + ",".join("9" * 150) + ")",
    "9" * LENGTH_MAX,
    "9" * 401,
    "9" * 400,
    "1e" + "9" * 300,
    "1e-" + "9" * 300,
    "0." + "0" * 390 + "1",
    "1" + "e1" * 100,
    "1." * 100,
    "." * 100,
    "*".join("9" * 100),
    "**".join("9" * 100),
    "^".join("9" * 49),
    "+".join("9" * 250),
    "//".join("9" * 100),
    "%".join("9" * 100),
    "-" * 500 + "1",
    "+" * 49 + "1",
    "-" * 51 + "1",
    "(" * 250 + "1" + ")" * 250,
    "(" * 49 + "1" + ")" * 49,
    "(" * 512,
    ")" * 512,
    "abs(" * 100 + "1" + ")" * 100,
    "min(1," * 60 + "1" + ")" * 60,
    "," * 512,
    " " * 512,
    "\t\n" * 200 + "1",
    "pi" * 200,
    "e" * 512,
    "e e e",
    "__import__('os').system('true')",
    "().__class__.__bases__[0].__subclasses__()",
    "lambda: 1",
    "[1 for _ in range(9**9)]",
    "{1: 2}",
    "exec('1')",
    "eval(1)",
    "open(1)",
    "print(1)",
    "1 if 1 else 2",
    "1 and 2",
    "not 1",
    "1 < 2",
    "1 == 1",
    "1 | 2",
    "1 & 2",
    "~1",
    "1 << 9999999999",
    "1 >> 1",
    "1 @ 2",
    "1j",
    "1_000",
    "0x10",
    "0b1",
    "0o7",
    "1,000",
    "1;2",
    "a=1",
    "a:=1",
    "inf",
    "nan",
    "infinity",
    "-inf",
    "nan + 1",
    "1e308 * 10",
    "1e308 + 1e308",
    "-1e308 - 1e308",
    "1e308 * 10 - 1e308 * 10",
    "1e-308 / 1e308",
    "tan(pi / 2)",
    "log(1e-320)",
    "log10(9**400)",
    "sqrt(9**400)",
    "exp(9**400)",
    "9**400 / 9**-400",
    "9**400 % 0.1",
    "9**400 // 0.1",
    "1e308 // 1e-308",
    "1e308 % 5e-324",
    "\x00",
    "1\x002",
    "\ud800",
    "\u202e1+1",
    "1\u00a0+\u00a01",
    "１ + １",
    "²",
    "π",
    "√4",
    "½",
    "1 − 1",
    "💥" * 100,
    "ſin(1)",
    "K",
    "\\",
    '"""',
    "f'{1}'",
    "%s%s%s%n",
    "${7*7}",
    "{{7*7}}",
    "1//" * 100,
    "**1",
    "1**",
    "*" * 500,
    "/" * 500,
    "((((1)))))",
    "sin",
    "sin(",
    "sin)",
    "sin(,)",
    "sin(1,)",
    "sin(1 2)",
    "sin sin 1",
    "sinsin(1)",
    "sin(sin)",
]


def test_there_are_enough_hostile_expressions() -> None:
    assert len(set(HOSTILE)) > 100


CODES = {
    "INVALID_EXPRESSION",
    "DIVISION_BY_ZERO",
    "TOO_LARGE",
    "OUT_OF_DOMAIN",
    "COMPLEX_RESULT",
    "NOT_FINITE",
}


def check_bounds(text: str) -> None:
    """Step by step: few steps, and no number on the way past its size. What is bounded so ends soon."""
    stack: list[int | float] = []
    try:
        steps = parse(text)
        assert len(text) <= LENGTH_MAX
        assert len(steps) <= PARTS_MAX
        for operation, number in steps:
            operands = [stack.pop() for _ in range(int(number) if operation else 0)]
            stack.append(apply(operation, *reversed(operands)) if operation else number)
            assert bits(stack[-1]) <= INTEGER_BITS_MAX
        assert evaluate(text) == stack.pop()
        assert not stack
    except ToolError as error:
        assert error.code in CODES
        assert len(str(error)) < 500


def bits(number: int | float) -> int:
    assert isinstance(number, int) or math.isfinite(number)
    return number.bit_length() if isinstance(number, int) else 64


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_expression_stays_within_the_bounds(text: str) -> None:
    check_bounds(text)


@unhurried
@given(st.text(max_size=600) | st.text("0123456789.eE+-*/%^(), \n" + "sqrtpimax", max_size=600))
def test_any_text_stays_within_the_bounds(text: str) -> None:
    check_bounds(text)


words = st.sampled_from([*FUNCTIONS, *CONSTANTS, "(", ")", ",", "+", "-", "*", "/", "//", "%", "**", "^", "9", "1e300"])


@unhurried
@given(st.lists(words | numbers, max_size=80).map(" ".join))
def test_any_words_of_the_grammar_stay_within_the_bounds(text: str) -> None:
    check_bounds(text)


@unhurried
@given(
    st.sampled_from(sorted(FUNCTIONS)),
    st.lists(st.integers() | st.floats(allow_nan=False, allow_infinity=False), max_size=3),
)
def test_a_function_of_any_numbers_is_a_number_or_a_tool_error(name: str, arguments: list[int | float]) -> None:
    check_bounds(f"{name}({', '.join(map(repr, arguments))})")


@pytest.mark.parametrize(
    ("inside", "past"),
    [
        ("(" * DEPTH_MAX + "1" + ")" * DEPTH_MAX, "(" * (DEPTH_MAX + 1) + "1" + ")" * (DEPTH_MAX + 1)),
        ("-" * DEPTH_MAX + "1", "-" * (DEPTH_MAX + 1) + "1"),
        ("^".join("1" * (DEPTH_MAX + 1)), "^".join("1" * (DEPTH_MAX + 2))),
        ("+".join("1" * (PARTS_MAX // 2)), "+".join("1" * (PARTS_MAX // 2 + 1))),
        ("9" * DIGITS_MAX + "/" + "9" * 100, "9" * (DIGITS_MAX + 1)),
        ("1" + " " * (LENGTH_MAX - 1), "1" + " " * LENGTH_MAX),
    ],
    ids=["brackets", "signs", "powers", "parts", "digits", "length"],
)
def test_each_bound_is_where_it_says(inside: str, past: str) -> None:
    assert math.isfinite(evaluate(inside))
    with pytest.raises(ToolError) as caught:
        evaluate(past)
    assert caught.value.code == "INVALID_EXPRESSION"


def test_a_malformed_expression_computes_nothing() -> None:
    with pytest.raises(ToolError, match="position 5"):
        evaluate("1/0 (")


# current_time


def test_the_time_is_now_in_utc() -> None:
    before = time.time()
    result = call(current_time)
    assert result["timezone"] == "UTC"
    moment = datetime.fromisoformat(result["time"])
    assert moment.utcoffset() == timedelta(0)
    assert math.floor(before) <= moment.timestamp() <= time.time()


def test_the_time_has_the_offset_of_its_zone() -> None:
    result = call(current_time, timezone="Asia/Kolkata")
    assert result["time"].endswith("+05:30")
    assert result["timezone"] == "Asia/Kolkata"


def test_unix_time_is_a_whole_number() -> None:
    before = int(time.time())
    result = call(current_time, timezone="Asia/Tokyo", format="unix")
    assert type(result["time"]) is int
    assert before <= result["time"] <= time.time()


def test_human_time_is_in_words() -> None:
    text = call(current_time, timezone="Europe/Paris", format="human")["time"]
    moment = datetime.strptime(text.rsplit(" ", 1)[0], "%A, %d %B %Y, %H:%M:%S").replace(
        tzinfo=ZoneInfo("Europe/Paris")
    )
    assert abs(moment.timestamp() - time.time()) < 60
    assert text.endswith((" CET", " CEST"))


def test_names_of_zones_are_found_in_any_case_and_told_as_they_are() -> None:
    assert call(current_time, timezone="europe/PARIS")["timezone"] == "Europe/Paris"


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "Mars/Olympus",
        "Europe",
        "Europe/",
        "/Europe/Paris",
        "Europe//Paris",
        "Europe/../Europe/Paris",
        "./UTC",
        "../etc/passwd",
        "../../../../etc/passwd",
        "/etc/passwd",
        "/usr/share/zoneinfo/UTC",
        "..",
        "zone.tab",
        "tzdata.zi",
        "posix/UTC",
        "UTC\x00",
        "\u0130stanbul",
        "C:\\Windows",
        "file:///etc/passwd",
    ],
)
def test_what_is_no_name_of_a_zone_is_refused_and_not_opened(name: str) -> None:
    assert failing(current_time, timezone=name) == "UNKNOWN_TIMEZONE"


@unhurried
@given(st.text(max_size=64))
def test_any_text_is_a_zone_or_is_refused(name: str) -> None:
    with pytest.raises(ToolError) as nowhere:
        call(current_time, timezone="Nowhere/At_All")
    try:
        result = call(current_time, timezone=name)
    except ToolError as error:
        assert error.code == "UNKNOWN_TIMEZONE"
        assert str(error) == str(nowhere.value)  # so nothing of what was asked for can be in it
    else:
        assert result["timezone"].lower() == name.lower()


@pytest.mark.parametrize(
    "parameters", [{"timezone": "U" * 65}, {"format": "rfc2822"}, {"timezone": None}, {"format": 1}]
)
def test_the_clock_refuses_what_its_schema_does_not_have(parameters: dict[str, Any]) -> None:
    with pytest.raises(InvalidParams):
        call(current_time, **parameters)
