"""Reading the log: pages by each filter, the same bytes from both engines, nobody else's rows, bounded."""

from __future__ import annotations

import asyncio
import base64
import gc
import itertools
import sys
import threading
import tracemalloc
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from app.calls import rfc3339
from app.errors import DependencyUnavailable, InvalidParams
from app.execution_log import history as module
from app.execution_log.history import LIMIT_MAX, ExecutionHistory, Filters
from tests.execution_log.database import database, fill, id_at, record, rows
from tests.servers import PostgresAt, PostgresServer
from tests.waiting import SOON_S

pytestmark = pytest.mark.anyio

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC).timestamp()

TENANTS, TOOLS, SUBJECTS, STATUSES = ("acme", "umbrella"), ("echo", "search"), ("anna", "ben"), ("success", "failed")

RECORDS = [
    record(
        at=NOON + number,
        tenant=tenant,
        tool_id=tool,
        subject=subject,
        status=status,
        parameters={"text": 'é\u2028"\\', "b": number, "a": [1.5, None]},
        result=None if status == "failed" else {"ok": True},
    )
    for number, (tenant, tool, subject, status, _) in enumerate(
        itertools.product(TENANTS, TOOLS, SUBJECTS, STATUSES, range(8))
    )
]
"""128 rows, a second apart, eight of each kind."""

KEYS = {
    *("execution_id", "tool_id", "tool_version", "tenant", "subject", "agent_id", "status", "error_type", "error_code"),
    *("started_at", "finished_at", "execution_ms", "overhead_ms", "attempts", "cached", "client_gone", "trace_id"),
    *("cost", "parameters", "result"),
}


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    async with database(database_url) as engine:
        await fill(engine, RECORDS)
        yield engine


def expected(**wanted: Any) -> list[str]:
    """Ids of the records whose columns have these values, newest first."""
    names = {"tool_id": 1, "tenant": 3, "subject": 4, "status": 6}
    values = [orjson.loads(one) for one in RECORDS]
    kept = [one for one in values if all(one[names[name]] == value for name, value in wanted.items())]
    return [one[0] for one in reversed(kept)]


def page_ids(found: list[bytes]) -> list[str]:
    return [orjson.loads(one)["execution_id"] for one in found]


async def walk(history: ExecutionHistory, tenant: str | None, filters: Filters, limit: int) -> list[str]:
    """All pages, one after the other."""
    found: list[str] = []
    cursor: str | None = None
    while True:
        page = await history.page(tenant, filters, limit, cursor)
        assert len(page.rows) <= limit
        found += page_ids(page.rows)
        cursor = page.next_cursor
        if cursor is None:
            return found


@pytest.mark.parametrize("unix_s", [1795285573.5249999, 1795285573.525, 1795285573.9999996, 0.0009996, 1e9])
def test_a_time_reads_the_same_in_an_answer_and_in_its_row_which_keeps_microseconds(unix_s: float) -> None:
    assert rfc3339(unix_s) == rfc3339(round(unix_s * 1e6) / 1e6)
    assert abs(datetime.fromisoformat(rfc3339(unix_s)).timestamp() - unix_s) < 0.001


async def test_a_row_has_the_columns_and_its_payloads_with_size_and_digest(engine: AsyncEngine) -> None:
    page = await ExecutionHistory(engine).page("acme", Filters(), 1)
    row = orjson.loads(page.rows[0])
    assert row.keys() == KEYS
    assert row["started_at"] == rfc3339(NOON + 63) == "2026-11-20T12:01:03.000Z"
    assert row["parameters"]["content"] == {"text": 'é\u2028"\\', "b": 63, "a": [1.5, None]}
    assert row["parameters"].keys() == {"content", "size_bytes", "sha256"}
    assert row["result"] == {"content": None, "size_bytes": None, "sha256": None}
    assert row["cached"] is False and row["cost"] == 1 and row["execution_ms"] == 3.25


@pytest.mark.parametrize(
    "names", [names for count in range(4) for names in itertools.combinations(("tool_id", "subject", "status"), count)]
)
async def test_filters_hold_together_and_pages_join_without_gap_or_overlap(
    engine: AsyncEngine, names: tuple[str, ...]
) -> None:
    history = ExecutionHistory(engine)
    choices = {"tool_id": "search", "subject": "anna", "status": "failed"}
    wanted = {name: choices[name] for name in names}
    for tenant in ("acme", None):
        belonging = wanted if tenant is None else {**wanted, "tenant": tenant}
        assert await walk(history, tenant, Filters.of(**wanted), 7) == expected(**belonging)
        assert await walk(history, tenant, Filters.of(**wanted), LIMIT_MAX) == expected(**belonging)


async def test_success_is_a_status_like_the_others(engine: AsyncEngine) -> None:
    history = ExecutionHistory(engine)
    assert await walk(history, "acme", Filters.of(status="success"), 10) == expected(tenant="acme", status="success")
    assert await walk(history, "acme", Filters.of(status="timeout"), 10) == []


async def test_since_is_in_and_until_is_not_by_the_time_of_the_start(engine: AsyncEngine) -> None:
    history = ExecutionHistory(engine)
    of_acme = expected(tenant="acme")  # 63 s down to 0 s
    for since, until, found in (
        (rfc3339(NOON + 60), None, of_acme[:4]),
        (None, rfc3339(NOON + 4), of_acme[-4:]),
        (rfc3339(NOON + 10), rfc3339(NOON + 12), of_acme[-12:-10]),
        ("2026-11-20T13:00:10+01:00", "2026-11-20t12:00:12z", of_acme[-12:-10]),
        ("2026-11-20T12:01:02.000001Z", None, of_acme[:1]),
        ("2026-11-20T12:01:02.000001999Z", None, of_acme[:1]),
        (rfc3339(NOON + 100), None, []),
        ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", of_acme),
    ):
        assert await walk(history, "acme", Filters.of(since=since, until=until), 3) == found


async def test_a_call_that_waited_is_found_by_its_start_and_not_by_its_id(database_url: str) -> None:
    waited = record(execution_id=id_at(NOON - 20), started_at=NOON + 1)
    async with database(database_url) as engine:
        await fill(engine, [waited, record(at=NOON - 10), record(execution_id=id_at(NOON - 1), started_at=NOON)])
        history = ExecutionHistory(engine)
        after = await history.page(None, Filters.of(since=rfc3339(NOON)))
        assert [orjson.loads(one)["started_at"] for one in after.rows] == [rfc3339(NOON), rfc3339(NOON + 1)]
        before = await history.page(None, Filters.of(until=rfc3339(NOON)))
        assert [orjson.loads(one)["started_at"] for one in before.rows] == [rfc3339(NOON - 10)]


async def test_one_row_is_only_for_its_tenant(engine: AsyncEngine) -> None:
    history = ExecutionHistory(engine)
    known = expected(tenant="acme")[0]
    found = await history.one("acme", known.upper())
    assert found is not None and [found] == (await history.page("acme", Filters(), 1)).rows
    assert await history.one(None, known) == found
    for tenant, execution_id in (
        ("umbrella", known),
        ("acme", id_at(NOON)),
        ("acme", "nothing"),
        ("acme", known + "\n"),
    ):
        assert await history.one(tenant, execution_id) is None


async def test_a_page_for_which_sqlite_has_no_thread_is_refused_and_the_next_is_not(tmp_path: Path) -> None:
    async with database(f"sqlite+aiosqlite:///{tmp_path / 'log.db'}") as engine:
        history = ExecutionHistory(engine)
        await engine.dispose()
        before = threading.stack_size(sys.maxsize // 2 + 1)  # more than there are addresses: the system refuses
        try:
            with pytest.raises(DependencyUnavailable):
                await history.page(None, Filters())
        finally:
            threading.stack_size(before)
        assert (await history.page(None, Filters())).rows == []


async def test_both_engines_answer_with_the_same_bytes(tmp_path: Path, postgres: PostgresAt) -> None:
    odd = [
        record(at=NOON, parameters=one)
        for one in (
            {"zz": 1, "b": 2, "aaa": 3},
            [1e16, -1e17, 1.0, -0.0, 1e-7, 2**63, 0.1, 1e300, 5e-324, 123456789012345680.0],
            [1.2345678901234567e18, 9.5e18, -9.5e18, 2.0**63, -(2.0**63), 1.844674407370955e19, 2.0**64],
            "text \u2028 é \U0001f600 \x7f",
            {"deep": [[[{"": {}}]]]},
            True,
            0,
        )
    ]
    answers = []
    for url in (f"sqlite+aiosqlite:///{tmp_path / 'log.db'}", postgres.create_database()):
        async with database(url) as engine:
            await fill(engine, RECORDS + odd)
            history = ExecutionHistory(engine)
            exported = b"".join([piece async for piece in history.export(None, Filters())])
            answers.append((await history.page(None, Filters(), 200), exported))
    assert answers[0] == answers[1]
    assert len(answers[0][0].rows) == len(RECORDS) + len(odd)


async def test_an_export_is_every_row_of_the_filter_one_to_a_line(engine: AsyncEngine) -> None:
    history = ExecutionHistory(engine)
    for tenant, filters, wanted in (
        ("acme", Filters(), expected(tenant="acme")),
        (None, Filters.of(tool_id="echo"), expected(tool_id="echo")),
        ("nobody", Filters(), []),
    ):
        exported = b"".join([piece async for piece in history.export(tenant, filters)])
        assert page_ids(exported.splitlines()) == wanted
        assert exported.count(b"\n") == len(wanted)


async def test_an_export_goes_on_after_a_row_and_ends_after_as_many_as_were_asked_for(engine: AsyncEngine) -> None:
    history = ExecutionHistory(engine)
    wanted = expected(tenant="acme")
    page = await history.page("acme", Filters(), 3)
    assert page.next_cursor is not None
    for limit, cursor, ids in (
        (2, None, wanted[:2]),
        (len(wanted), None, wanted),
        (len(wanted) + 1, None, wanted),
        (None, wanted[2], wanted[3:]),
        (None, wanted[2].upper(), wanted[3:]),
        (4, page.next_cursor, wanted[3:7]),
        (None, wanted[-1], []),
    ):
        exported = b"".join([piece async for piece in history.export("acme", Filters(), limit, cursor)])
        assert page_ids(exported.splitlines()) == ids


async def test_rows_that_come_during_an_export_are_not_in_it(engine: AsyncEngine) -> None:
    export = ExecutionHistory(engine).export("acme", Filters())
    first = await anext(export)
    await fill(engine, [record(at=NOON + 3_600)])
    rest = [piece async for piece in export]
    assert page_ids(b"".join([first, *rest]).splitlines()) == expected(tenant="acme")


async def test_large_rows_end_a_page_early_and_shrink_the_pieces_of_an_export(database_url: str) -> None:
    large = "x" * 1_000_000
    records = [record(at=NOON + number, parameters=large, result=large) for number in range(12)]
    async with database(database_url) as engine:
        await fill(engine, records)
        history = ExecutionHistory(engine)
        page = await history.page(None, Filters(), 12)
        assert 4 <= len(page.rows) <= 5 and page.next_cursor is not None
        assert sum(map(len, page.rows)) <= module.PAGE_BYTES_MAX + 2_001_000
        assert len(await walk(history, None, Filters(), 12)) == 12
        pieces = [piece async for piece in history.export(None, Filters())]
        assert sum(piece.count(b"\n") for piece in pieces) == 12


async def test_no_more_rows_are_read_at_once_than_there_is_room_for(database_url: str) -> None:
    large = "x" * 1_000_000
    payloads = {"parameters": large, "parameters_bytes": 1_000_002, "result": large, "result_bytes": 1_000_002}
    records = [record(at=NOON + number, **payloads) for number in range(24)]
    async with database(database_url) as engine:
        await fill(engine, records)
        history = ExecutionHistory(engine, payload_bytes_max=1_000_000)
        pieces = [piece async for piece in history.export(None, Filters())]
        assert sum(piece.count(b"\n") for piece in pieces) == 24
        assert max(map(len, pieces)) <= 2 * module.CHUNK_BYTES_MAX
        del pieces
        tracemalloc.start()
        try:
            page = await history.page(None, Filters(), 24)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert len(page.rows) == 5
        assert peak_bytes < 24 * 2_000_000, "rows that the page has no room for"


async def test_pieces_have_as_many_rows_as_fit_and_not_as_would_fit_at_their_largest(database_url: str) -> None:
    small = [record(at=NOON + number, parameters="x") for number in range(250)]
    large = [record(at=NOON + 1_000 + number, result="y" * 999_998, result_bytes=1_000_000) for number in range(10)]
    async with database(database_url) as engine:
        await fill(engine, small + large)
        history = ExecutionHistory(engine, payload_bytes_max=1_000_000)
        rows = [piece.count(b"\n") async for piece in history.export(None, Filters())]
        assert sum(rows) == 260 and rows[0] == 8 and len(rows) < 10
        assert len((await history.page(None, Filters(until_us=int((NOON + 900) * 1e6)), 250)).rows) == 250


async def test_pages_of_every_size_are_whole(database_url: str) -> None:
    async with database(database_url) as engine:
        await fill(engine, [record(at=NOON + number) for number in range(501)])
        history = ExecutionHistory(engine)
        for limit in (1, 50, 99, 100, 101, 499, 500):
            page = await history.page("acme", Filters(), limit)
            assert len(page.rows) == limit
            assert page.next_cursor is not None
        last = await history.page("acme", Filters(), 500, page.next_cursor)
        assert (len(last.rows), last.next_cursor) == (1, None)


@pytest.mark.parametrize(
    ("field", "filters"),
    [
        ("status", {"status": "SUCCESS"}),
        ("status", {"status": "success' OR '1'='1"}),
        ("tool_id", {"tool_id": "a\x00"}),
        ("subject", {"subject": "\ud800"}),
        ("subject", {"subject": "s" * 1_025}),
        *(
            ("since", {"since": text})
            for text in (
                "yesterday",
                "2026-11-21",
                "2026-11-20T12:00:00",
                "2026-13-01T00:00:00Z",
                "٢026-11-20T12:00:00Z",
            )
        ),
        ("until", {"until": "2026-11-20T25:00:00Z"}),
    ],
)
def test_a_filter_that_cannot_be_is_refused_by_its_name_and_without_its_value(
    field: str, filters: dict[str, str]
) -> None:
    with pytest.raises(InvalidParams) as refused:
        Filters.of(**filters)
    (problem,) = refused.value.data["errors"]
    assert problem["path"] == field
    assert filters[field] not in problem["message"]


@pytest.mark.parametrize(
    "cursor", ["", "x", "=" * 22, "é" * 22, "A" * 23, "A" * 21 + "!", base64.b64encode(b"x" * 17).decode()]
)
async def test_a_cursor_that_was_never_given_is_refused(engine: AsyncEngine, cursor: str) -> None:
    with pytest.raises(InvalidParams) as refused:
        await ExecutionHistory(engine).page("acme", Filters(), 50, cursor)
    assert refused.value.data["errors"][0]["path"] == "cursor"


@pytest.mark.parametrize("limit", [0, -1, LIMIT_MAX + 1])
async def test_a_limit_out_of_bounds_is_refused(engine: AsyncEngine, limit: int) -> None:
    with pytest.raises(InvalidParams):
        await ExecutionHistory(engine).page("acme", Filters(), limit)


async def test_values_never_become_sql(engine: AsyncEngine) -> None:
    history = ExecutionHistory(engine)
    for text in ("' OR '1'='1", "%", "{}", "$1", "?", ":x"):
        assert await walk(history, text, Filters(), 10) == []
        assert await walk(history, "acme", Filters.of(tool_id=text, subject=text), 10) == []


# The database away


async def test_a_server_that_is_away_or_stands_still_is_said_to_be_in_bounded_time(
    own_postgres: PostgresServer,
) -> None:
    async with database(own_postgres.create_database()) as engine:
        await fill(engine, RECORDS)
        history, hasty = ExecutionHistory(engine), ExecutionHistory(engine, timeout_s=0.3)
        for break_it, mend_it in ((own_postgres.pause, own_postgres.resume), (own_postgres.kill, own_postgres.start)):
            assert len((await history.page(None, Filters())).rows) == 50
            break_it()
            async with asyncio.timeout(SOON_S):
                with pytest.raises(DependencyUnavailable):
                    await hasty.page(None, Filters())
            mend_it()
        assert engine.pool.checkedout() == 0


async def test_a_query_that_takes_too_long_is_ended_by_the_server_and_the_next_one_works(postgres: PostgresAt) -> None:
    async with database(postgres.create_database()) as engine:
        history, hasty = ExecutionHistory(engine), ExecutionHistory(engine, timeout_s=0.1)
        async with engine.begin() as other:
            await other.exec_driver_sql("LOCK TABLE tool_executions IN ACCESS EXCLUSIVE MODE")
            with pytest.raises(DependencyUnavailable, match="narrow it by since"):
                await hasty.page(None, Filters())
        assert await history.page(None, Filters()) == ([], None)
        assert await rows(engine, "SHOW statement_timeout") == [("0",)]


@pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")
async def test_readers_that_are_cancelled_leave_their_places_and_connections(engine: AsyncEngine) -> None:
    history = ExecutionHistory(engine)
    places = history._places.free
    for _ in range(3):
        asked = [asyncio.create_task(history.page(None, Filters())) for _ in range(12)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for one in asked:
            one.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
    assert len((await history.page(None, Filters())).rows) == 50
    assert history._places.free == places
    # aiosqlite leaves a connection whose opening was cancelled to the collector, and Python 3.13 tells: here it may.
    gc.collect()


async def test_a_tenant_that_reads_much_lets_another_have_its_turn(engine: AsyncEngine) -> None:
    history = ExecutionHistory(engine)
    places = history._places.free
    for _ in range(places):
        await history._places.acquire("acme")
    read: list[str] = []

    async def one_page(tenant: str) -> None:
        await history.page(tenant, Filters(), 1)
        read.append(tenant)

    reading = [asyncio.create_task(one_page("acme")) for _ in range(20)]
    await asyncio.sleep(0)
    reading.append(asyncio.create_task(one_page("umbrella")))
    await asyncio.sleep(0)
    history._places.release()
    await asyncio.gather(*reading)
    assert read.index("umbrella") <= 2
    for _ in range(places - 1):
        history._places.release()
    assert history._places.free == places
