"""Look-up, lists and search at 10,000 registered tools."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest

from app.calls import LOCAL_CALLER
from app.tools.registry import Registry, ToolFilter
from load.many import WORDS, tools

TOOLS = 10_000
QUERIES = 500

Benchmark = Callable[..., Any]

pytestmark = pytest.mark.benchmark(group="registry, 10,000 tools")


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry(tools(TOOLS), timeout_ceiling_s=30.0)


def queries() -> list[str]:
    return [" ".join(random.Random(number).sample(WORDS, 2)) for number in range(QUERIES)]


def bench_look_up_by_id(benchmark: Benchmark, registry: Registry) -> None:
    ids = itertools.cycle(random.Random(3).sample(registry.snapshot.ids, 1_000))
    benchmark(lambda: registry.lookup(next(ids), LOCAL_CALLER))


def bench_list_of_100_kept(benchmark: Benchmark, registry: Registry) -> None:
    everything = ToolFilter()
    benchmark(lambda: registry.page(everything, LOCAL_CALLER, 100, None))


def bench_list_of_100_built_anew(benchmark: Benchmark) -> None:
    uncached, everything = Registry(tools(TOOLS), timeout_ceiling_s=30.0, cache_answers=False), ToolFilter()
    benchmark(lambda: uncached.page(everything, LOCAL_CALLER, 100, None))


def bench_search_two_words(benchmark: Benchmark, registry: Registry) -> None:
    asked, everything = itertools.cycle(queries()), ToolFilter()
    benchmark(lambda: registry.search(next(asked), everything, LOCAL_CALLER, None))


def bench_search_with_a_typo(benchmark: Benchmark, registry: Registry) -> None:
    asked, everything = itertools.cycle([query[:3] + query[4:] for query in queries()]), ToolFilter()
    benchmark(lambda: registry.search(next(asked), everything, LOCAL_CALLER, None))
