"""Kept answers are bounded in number and bytes, and the newest are the ones kept."""

from __future__ import annotations

import orjson
import pytest
from jsonschema import Draft202012Validator

from app.calls import LOCAL_CALLER, Caller
from app.errors import ToolNotFound
from app.tools.registry import PAGES_BYTES_MAX, PAGES_KEPT_MAX, Registry, ToolFilter
from app.tools.tool import FunctionTool, tool
from app.transport.shapes import ToolLimits


def registry_of(count: int, description: str = "Work.") -> Registry:
    def work() -> None:
        pass

    made: list[FunctionTool] = [tool(id=f"work_{n}", description=description)(work) for n in range(count)]
    return Registry(made, timeout_ceiling_s=1.0)


def page(registry: Registry, limit: int, tag: str | None = None) -> bytes:
    return registry.page(ToolFilter(tags=(tag,) if tag else ()), LOCAL_CALLER, limit, None)


def kept_bytes(registry: Registry) -> int:
    return sum(map(len, registry.snapshot.pages.values()))


def test_long_pages_are_kept_up_to_their_bytes_and_the_oldest_goes_first() -> None:
    registry = registry_of(30, "Work. " * 6_000)  # 36 KB a tool, 1 MB a page
    first, last = page(registry, 29), b""
    for limit in range(15, 29):
        last = page(registry, limit)
        assert kept_bytes(registry) <= PAGES_BYTES_MAX
    assert page(registry, 28) is last
    assert page(registry, 29) is not first and page(registry, 29) == first


def test_short_pages_are_kept_up_to_their_number_and_a_new_one_always_finds_room() -> None:
    registry = registry_of(1)
    for n in range(PAGES_KEPT_MAX + 10):
        page(registry, 1, f"tag-{n}")
    assert len(registry.snapshot.pages) == PAGES_KEPT_MAX
    assert page(registry, 1, "wanted") is page(registry, 1, "wanted")


def test_a_page_longer_than_all_that_is_kept_is_answered_and_pushes_none_out() -> None:
    registry = registry_of(30, "Work. " * 60_000)  # 360 KB a tool
    kept = page(registry, 1)
    assert len(page(registry, 30)) > PAGES_BYTES_MAX
    assert page(registry, 1) is kept and kept_bytes(registry) == len(kept)


def test_the_detail_of_a_tool_shows_its_title() -> None:
    @tool(title="Find a ticket")
    async def find() -> None:
        """Find."""

    detail = orjson.loads(Registry([find], timeout_ceiling_s=1.0).detail("find", LOCAL_CALLER))
    assert detail["title"] == "Find a ticket"


def listed(registry: Registry, *globs: str) -> list[str]:
    """What a caller with this allow-list sees; asserts that look-up, page and search agree about it."""
    caller = Caller("t", "s", tools=globs)
    answers = [registry.page(ToolFilter(), caller, None, None), registry.search("", ToolFilter(), caller, 100)]
    found, searched = ([tool["tool_id"] for tool in orjson.loads(answer)["tools"]] for answer in answers)
    for tool_id in registry.snapshot.ids:
        try:
            registry.lookup(tool_id, caller)
            assert tool_id in found
        except ToolNotFound:
            assert tool_id not in found
    assert searched == found
    return found


def test_an_allow_list_shows_and_lets_call_what_its_globs_name() -> None:
    registry = registry_of(12)
    assert listed(registry, "work_1") == ["work_1"]
    assert listed(registry, "work_1*", "work_3") == ["work_1", "work_10", "work_11", "work_3"]
    assert listed(registry, "work_1?") == ["work_10", "work_11"]
    assert len(listed(registry, "*")) == 12


def test_an_empty_allow_list_allows_nothing_and_neither_do_patterns_of_other_languages() -> None:
    registry = registry_of(3)
    assert listed(registry) == []
    for glob in (".*", "work_[0-9]", "work_%", "WORK_1", "work_1 ", "", "**x"):
        assert listed(registry, glob) == []


def test_callers_of_different_allow_lists_do_not_get_one_another_s_pages() -> None:
    registry = registry_of(3)
    assert listed(registry, "work_0") == ["work_0"]
    assert listed(registry, "work_2") == ["work_2"]


def test_a_glob_of_many_stars_is_matched_in_linear_time() -> None:
    def work() -> None:
        pass

    registry = Registry([tool(id="a" * 64, description="x")(work)], timeout_ceiling_s=1.0)
    assert listed(registry, "*a" * 40 + "b") == []


def test_the_detail_of_a_tool_shows_each_limit_that_it_declares() -> None:
    @tool(rate_limits=["2/minute", "10/hour"], quotas={"daily": 5}, max_concurrent=3, cost=2)
    async def find() -> None:
        """Find."""

    @tool
    async def free() -> None:
        """Find for nothing."""

    registry = Registry([find, free], timeout_ceiling_s=1.0)
    limits = [orjson.loads(registry.detail(tool_id, LOCAL_CALLER))["limits"] for tool_id in ("find", "free")]
    assert limits == [
        {"max_concurrent": 3, "rate_limits": ["2/minute", "10/hour"], "quotas": {"daily": 5}, "cost": 2},
        {"max_concurrent": None, "rate_limits": [], "quotas": {}, "cost": 1},
    ]
    published = ToolLimits.model_json_schema()
    for each in limits:
        Draft202012Validator(published | {"additionalProperties": False}).validate(each)


def test_tools_are_replaced_all_at_once() -> None:
    registry = registry_of(3)
    before, snapshot = page(registry, 10), registry.snapshot
    (gone, *_), kept = snapshot.tools.values(), registry_of(1).snapshot.tools["work_0"]
    registry.replace([kept])
    assert page(registry, 10) == page(registry_of(1), 10) != before
    assert registry.lookup("work_0", LOCAL_CALLER) is kept and registry.holds(kept) and not registry.holds(gone)
    with pytest.raises(ToolNotFound):
        registry.lookup("work_1", LOCAL_CALLER)
    assert len(snapshot.tools) == 3, "whoever reads it goes on with what it was"
