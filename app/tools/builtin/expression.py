"""Arithmetic expressions: text to number, by a grammar of its own. Nothing here is Python's parser or `eval`.

Length, depth and number of parts are bounded, and an expression is parsed whole before any of it is computed.
Precedence and associativity are those of mathematics and of Python; `^` is power.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Never

from app.errors import ToolError
from app.tools.builtin.arithmetic import CONSTANTS, FUNCTIONS, OPERATIONS, Number, apply

LENGTH_MAX = 512
DEPTH_MAX = 50
"""Brackets, signs and powers inside one another; each costs the parser three frames of Python's stack."""

PARTS_MAX = 200
"""Numbers, names and operations: some 200 operations on 400 digits are well under a millisecond."""

DIGITS_MAX = 400
"""Of one number, as written; INTEGER_BITS_MAX is the same bound on results."""

_TOKEN = re.compile(
    r"[ \t\r\n]*(?:"
    r"(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)|(?P<name>[A-Za-z_][A-Za-z0-9_]*)"
    r"|(?P<sign>\*\*|//|[-+*/%^(),])|(?P<end>$)|(?P<unknown>.))",
    re.DOTALL,
)

_SIGN, _POWER = 3, 4
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "//": 2, "%": 2, "**": _POWER, "^": _POWER}
"""A sign binds looser than a power and tighter than a product: -2**2 is -4, 2**-1 is 0.5."""

_BINARY: dict[str, Callable[..., Number]] = {**OPERATIONS, "//": operator.floordiv}

Step = tuple[Callable[..., Number] | None, Number]
"""An operation and its number of operands, or None and a number."""


def evaluate(expression: str) -> Number:
    """The value, a finite real number. Raises ToolError: INVALID_EXPRESSION with the position, or as `apply` does.

    Positions count characters from 1. No error repeats a part of the text.
    """
    stack: list[Number] = []
    for operation, number in parse(expression):
        if operation is None:
            stack.append(number)
        else:
            first = len(stack) - int(number)
            stack[first:] = [apply(operation, *stack[first:])]
    return stack.pop()


def parse(expression: str) -> list[Step]:
    """What to compute, in reverse Polish order."""
    if len(expression) > LENGTH_MAX:
        _refuse(LENGTH_MAX + 1, f"longer than {LENGTH_MAX} characters")
    return _Parser(expression).steps


def _refuse(position: int, problem: str) -> Never:
    raise ToolError(f"Invalid expression at position {position}: {problem}", code="INVALID_EXPRESSION")


class _Parser:
    """Precedence climbing. What it has read stands in `steps`."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._depth = 0
        self.steps: list[Step] = []
        self._end = 0
        self._advance()
        self._operations(1)
        if self._kind != "end":
            self._unexpected("an operator")

    def _advance(self) -> None:
        match = _TOKEN.match(self._text, self._end)
        assert match is not None and match.lastgroup is not None  # every text has a token or its end
        self._kind, self._word = match.lastgroup, match[match.lastgroup]
        self._position, self._end = match.start(match.lastgroup) + 1, match.end()

    def _operations(self, precedence_min: int) -> None:
        """An operand and all operations after it that bind at least this tightly."""
        self._operand()
        while (precedence := _PRECEDENCE.get(self._word, 0)) >= precedence_min:
            compute = _BINARY[self._word]
            self._advance()
            if precedence == _POWER:
                self._deeper(_POWER)
            else:
                self._operations(precedence + 1)
            self._emit(compute, 2)

    def _deeper(self, precedence_min: int) -> None:
        self._depth += 1
        if self._depth > DEPTH_MAX:
            _refuse(self._position, f"nested more than {DEPTH_MAX} deep")
        self._operations(precedence_min)
        self._depth -= 1

    def _operand(self) -> None:
        if self._kind == "number":
            self._number()
        elif self._kind == "name":
            self._name()
        elif self._word in ("-", "+"):
            self._signed()
        elif self._word == "(":
            self._advance()
            self._deeper(1)
            self._expect(")")
        else:
            self._unexpected("a number, a name, a sign or (")

    def _number(self) -> None:
        if len(self._word) > DIGITS_MAX:
            _refuse(self._position, f"a number of more than {DIGITS_MAX} characters")
        self._emit(None, apply(int if self._word.isdigit() else float, self._word))  # type: ignore[arg-type]
        self._advance()

    def _signed(self) -> None:
        negative = self._word == "-"
        self._advance()
        self._deeper(_SIGN)
        if negative:
            self._emit(operator.neg, 1)

    def _name(self) -> None:
        name, position = self._word.lower(), self._position
        self._advance()
        if name in CONSTANTS:
            self._emit(None, CONSTANTS[name])
        elif name in FUNCTIONS:
            self._call(name, position)
        else:
            _refuse(position, f"unknown name; there are {', '.join([*CONSTANTS, *FUNCTIONS])}")

    def _call(self, name: str, position: int) -> None:
        function = FUNCTIONS[name]
        self._expect("(")
        self._deeper(1)
        arguments = 1
        while self._word == ",":
            self._advance()
            self._deeper(1)
            arguments += 1
        self._expect(")")
        if not function.arguments_min <= arguments <= function.arguments_max:
            _refuse(position, f"{name} takes {function.arguments_min} to {function.arguments_max} arguments")
        self._emit(function.compute, arguments)

    def _expect(self, sign: str) -> None:
        if self._word != sign:
            self._unexpected(sign)
        self._advance()

    def _emit(self, operation: Callable[..., Number] | None, number: Number) -> None:
        if len(self.steps) == PARTS_MAX:
            _refuse(self._position, f"more than {PARTS_MAX} numbers and operations")
        self.steps.append((operation, number))

    def _unexpected(self, wanted: str) -> Never:
        _refuse(self._position, f"ends where {wanted} should be" if self._kind == "end" else f"expected {wanted}")
