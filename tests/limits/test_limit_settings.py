"""The settings of limits: each has the effect that it says, and a value that cannot be is refused by name."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.calls import LOCAL_CALLER, Execution, ToolCall, new_execution_id
from app.errors import ToolServiceError
from app.service import Service, open_service
from app.settings import SettingsError, read_settings
from tests.conftest import ROOT, service_environ
from tests.servers import HOST, RedisServer, free_port

pytestmark = pytest.mark.anyio

BUDGET_MS = 4_000
"""Long enough to be told from everything else that a call waits for, a machine that stands still among it."""

ARGUMENTS = {"echo": {"message": "x"}, "current_time": {}}


@contextlib.asynccontextmanager
async def serving(folder: Path, **environ: str) -> AsyncIterator[Service]:
    folder.mkdir(exist_ok=True)
    settings = read_settings(service_environ(folder, ENABLE_DATABASE_LOGGING="false", **environ))
    async with open_service(settings) as service:
        yield service


async def execute(service: Service, tool_id: str = "echo", agent_id: str = "a") -> Execution:
    call = ToolCall(
        new_execution_id(), tool_id, ARGUMENTS[tool_id], LOCAL_CALLER, time.perf_counter(), agent_id=agent_id
    )
    return await service.executor.execute(call)


async def outcomes(service: Service, calls: int, tool_id: str = "echo", agent_id: str = "a") -> list[str]:
    """Of so many calls one after another: the status, or the type of the refusal."""
    found = [await execute(service, tool_id, agent_id) for _ in range(calls)]
    return [one.status if one.refusal is None else one.refusal.kind.error_type for one in found]


async def refusal(service: Service, agent_id: str = "a") -> ToolServiceError:
    refused = (await execute(service, agent_id=agent_id)).refusal
    assert refused is not None
    return refused


async def test_limits_rate_is_of_each_subject_over_all_tools(tmp_path: Path) -> None:
    async with serving(tmp_path, LIMITS_RATE="3/hour") as service:
        assert await outcomes(service, 2) + await outcomes(service, 1, "current_time") == ["success"] * 3
        data = (await refusal(service)).as_data()
        assert (data["error_type"], data["limit"], data["rule"]) == ("rate_limit", 3, "settings:rate")
        assert 0 < data["retry_after_ms"] <= 1_200_000
        assert await outcomes(service, 4, agent_id="b") == ["success"] * 3 + ["rate_limit"]


async def test_limits_quota_daily_is_of_the_tenant_until_midnight(tmp_path: Path) -> None:
    async with serving(tmp_path, LIMITS_QUOTA_DAILY="3") as service:
        both = await outcomes(service, 2) + await outcomes(service, 2, agent_id="b")
        assert both == ["success"] * 3 + ["quota"]
        data = (await refusal(service)).as_data()
        assert (data["limit"], data["rule"]) == (3, "settings:daily")
        assert data["reset_at"].endswith("T00:00:00.000Z")


async def test_limits_quota_monthly_is_of_the_tenant_until_the_first_and_leaves_the_day_alone(tmp_path: Path) -> None:
    async with serving(tmp_path, LIMITS_QUOTA_DAILY="50", LIMITS_QUOTA_MONTHLY="3") as service:
        both = await outcomes(service, 2) + await outcomes(service, 2, agent_id="b")
        assert both == ["success"] * 3 + ["quota"]
        data = (await refusal(service)).as_data()
        assert (data["limit"], data["rule"]) == (3, "settings:monthly")
        assert data["reset_at"].endswith("-01T00:00:00.000Z")
        status = await service.executor.look_at_limits(LOCAL_CALLER, "echo", None)
        assert [status["quota"][name]["used"] for name in ("daily", "monthly")] == [3, 3]


async def test_a_policy_that_matches_no_tool_is_taken_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "limits.yaml"
    path.write_text(
        "policies:\n"
        "  - {name: mistyped, match: {tool: web_serach}, rate: 1/hour}\n"
        "  - {name: glob, match: {tool: 'mail_*'}, rate: 1/hour}\n"
        "  - {name: all, rate: 1000/hour}\n"
        "  - {name: some, match: {tool: 'e?ho'}, rate: 1000/hour}\n"
    )
    async with serving(tmp_path, LIMITS_FILE=str(path), LIMITS_RATE="1000/hour") as service:
        assert await outcomes(service, 2) == ["success"] * 2
    told = [vars(one)["rules"] for one in caplog.records if one.message == "limit policies match no tool"]
    assert told == [["mistyped", "glob"]]


async def test_limits_file_holds_policies_and_a_bad_one_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "limits.yaml"
    path.write_text(
        "policies:\n"
        "  - name: echoes\n"
        "    match: {tool: ech*}\n"
        "    per: [tool]\n"
        "    rate: 2/hour\n"
        "  - name: watched\n"
        "    quota: {daily: 1}\n"
        "    mode: shadow\n"
    )
    async with serving(tmp_path, LIMITS_FILE=str(path)) as service:
        assert await outcomes(service, 3) == ["success", "success", "rate_limit"]
        assert (await refusal(service, "b")).data["rule"] == "echoes"
        assert await outcomes(service, 3, "current_time") == ["success"] * 3
        assert service.metrics.limit_decisions["daily"]["would_refuse"] == 4
    path.write_text("policies:\n  - name: echoes\n    rate: 2/fortnight\n")
    assert "limits.yaml:3: " in refused(tmp_path, LIMITS_FILE=str(path))
    assert "LIMITS_FILE: /nope: cannot be read" in refused(tmp_path, LIMITS_FILE="/nope")


async def test_redis_url_makes_replicas_share_their_limits(tmp_path: Path, one_redis: RedisServer) -> None:
    shared = {"REDIS_URL": one_redis.url, "LIMITS_TIMEOUT_MS": "10000", "LIMITS_QUOTA_DAILY": "5"}
    async with serving(tmp_path / "one", **shared) as first, serving(tmp_path / "two", **shared) as second:
        assert await outcomes(first, 3) == ["success"] * 3
        assert await outcomes(second, 3) == ["success", "success", "quota"]
        assert await outcomes(first, 1) == ["quota"]
        assert first.metrics.gauges["limit_store_up"]() == 1
    async with serving(tmp_path / "three", LIMITS_QUOTA_DAILY="5") as alone:
        assert await outcomes(alone, 6) == ["success"] * 5 + ["quota"]


async def test_limits_timeout_ms_is_what_a_call_waits_for_a_silent_redis(
    tmp_path: Path, own_redis: RedisServer
) -> None:
    environ = {"REDIS_URL": own_redis.url, "LIMITS_TIMEOUT_MS": str(BUDGET_MS), "LIMITS_RATE": "100/hour"}
    async with serving(tmp_path, **environ) as service:
        assert await outcomes(service, 1) == ["success"]
        own_redis.pause()
        waited_ms = [(await execute(service)).overhead_s * 1e3 for _ in range(3)]
        assert waited_ms[0] >= BUDGET_MS - 10
        assert max(waited_ms[1:]) < BUDGET_MS - 10, "the store is known to be away"
        own_redis.resume()


async def test_limits_expected_replicas_is_by_how_many_a_limit_is_parted_without_redis(tmp_path: Path) -> None:
    gone = {"REDIS_URL": f"redis://{HOST}:{free_port()}", "LIMITS_RATE": "12/hour"}
    async with serving(tmp_path / "one", LIMITS_EXPECTED_REPLICAS="4", **gone) as service:
        assert await outcomes(service, 5) == ["success"] * 3 + ["rate_limit"] * 2
        assert service.metrics.gauges["limit_store_up"]() == 0
    async with serving(tmp_path / "two", **gone) as service:
        assert await outcomes(service, 7) == ["success"] * 6 + ["rate_limit"]


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("LIMITS_QUOTA_DAILY", "0", "greater than or equal to 1"),
        ("LIMITS_QUOTA_MONTHLY", "many", "integer"),
        ("LIMITS_TIMEOUT_MS", "0", "greater than or equal to 1"),
        ("LIMITS_EXPECTED_REPLICAS", "0", "greater than or equal to 1"),
        ("REDIS_URL", "http://:hunter2@localhost", "redis://"),
    ],
)
def test_a_setting_of_limits_that_cannot_be_is_refused_by_name(name: str, value: str, told: str) -> None:
    with pytest.raises(SettingsError) as refusing:
        read_settings({name: value})
    said = str(refusing.value)
    assert name in said and told in said and "hunter2" not in said


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("LIMITS_RATE", "10 per second", "N/second"),
        ("REDIS_URL", "redis://:hunter2@one,two", "one host only"),
    ],
)
def test_what_only_the_limits_themselves_can_tell_is_refused_by_name_too(
    tmp_path: Path, name: str, value: str, told: str
) -> None:
    said = refused(tmp_path, **{name: value})
    assert name in said and told in said and "hunter2" not in said


def refused(folder: Path, **environ: str) -> str:
    """What a service that will not start says; it exits 2."""
    done = subprocess.run(
        [sys.executable, "-m", "app", "serve", "--port", "0"],
        cwd=ROOT,
        env=service_environ(folder, **environ),
        capture_output=True,
    )
    assert done.returncode == 2 and done.stdout == b""
    return done.stderr.decode()
