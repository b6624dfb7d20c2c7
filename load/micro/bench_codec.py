"""Bytes of a request to its value, and parameters to what a tool takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
import pytest

from app.tools.builtin.basic import calculator, echo
from app.transport.jsonrpc import decode
from load.harness import BODY, call_body

Benchmark = Callable[..., Any]


@pytest.mark.benchmark(group="codec")
def bench_decode_a_call(benchmark: Benchmark) -> None:
    benchmark(decode, BODY)


@pytest.mark.benchmark(group="codec")
def bench_decode_a_batch_of_20(benchmark: Benchmark) -> None:
    benchmark(decode, b"[" + b",".join([BODY] * 20) + b"]")


@pytest.mark.benchmark(group="codec")
def bench_decode_100_kb(benchmark: Benchmark) -> None:
    benchmark(decode, call_body("x" * 100_000))


@pytest.mark.benchmark(group="codec")
def bench_bare_orjson_of_a_call(benchmark: Benchmark) -> None:
    """What the codec cannot go under."""
    benchmark(orjson.loads, BODY)


@pytest.mark.benchmark(group="validation")
def bench_parameters_of_echo(benchmark: Benchmark) -> None:
    benchmark(echo.parameters.validate, {"message": "hello world"})


@pytest.mark.benchmark(group="validation")
def bench_parameters_of_calculator(benchmark: Benchmark) -> None:
    benchmark(calculator.parameters.validate, {"operation": "add", "a": 1, "b": 2.5})
