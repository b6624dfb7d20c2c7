"""Rows: exactly once, whatever is among them and whatever the database does."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import orjson
import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from app import migration
from app.clients import create_engine
from app.execution_log.columns import COLUMNS
from app.execution_log.connections import StoreAway, opened
from app.execution_log.partitions import Month, Upkeep, drop_partitions, ensure_partitions
from app.execution_log.store import ExecutionStore, Stored
from tests.execution_log.database import database, id_at, ids, logged, record, rows, run
from tests.servers import PostgresAt, PostgresServer
from tests.waiting import SOON_S

pytestmark = pytest.mark.anyio

DAY_S = 86_400.0


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    async with database(database_url) as engine:
        yield engine


@pytest.fixture
async def pg(postgres: PostgresAt) -> AsyncIterator[AsyncEngine]:
    async with database(postgres.create_database()) as engine:
        yield engine


async def test_a_record_becomes_the_row_that_it_says(engine: AsyncEngine) -> None:
    one = record(agent_id="agent", result={"b": [1, None], "a": "é"}, cost=3, attempts=2, cached=True)
    assert await ExecutionStore(engine).write([one]) == Stored(1, 0, 0)
    (found,) = await rows(engine, f"SELECT {', '.join(COLUMNS)} FROM tool_executions")
    values = dict(zip(COLUMNS, found, strict=True))
    sent = dict(zip(COLUMNS, orjson.loads(one), strict=True))
    for name in ("parameters", "result"):
        kept = values.pop(name)
        assert (orjson.loads(kept) if isinstance(kept, str) else kept) == sent.pop(name)
    for name in ("started_at", "finished_at"):
        kept = values.pop(name)
        micros = kept if isinstance(kept, int) else round(kept.timestamp() * 1e6)
        assert micros == round(sent.pop(name) * 1e6)
    assert {name: str(value) if name == "execution_id" else value for name, value in values.items()} == sent


async def test_a_payload_that_was_not_kept_is_null_and_not_the_json_null(engine: AsyncEngine) -> None:
    await ExecutionStore(engine).write([record(parameters=None)])
    assert await rows(engine, "SELECT count(*) FROM tool_executions WHERE parameters IS NULL") == [(1,)]


async def test_what_is_offered_twice_is_written_once(engine: AsyncEngine) -> None:
    store, records = ExecutionStore(engine), [record() for _ in range(100)]
    assert await store.write(records) == Stored(100, 0, 0)
    assert await store.write([*records, record()]) == Stored(1, 100, 0)
    assert await store.write([]) == Stored(0, 0, 0)
    assert len(await logged(engine)) == 101


async def test_writers_that_offer_the_same_at_once_write_it_once(engine: AsyncEngine) -> None:
    records = [record() for _ in range(300)]
    stores = [ExecutionStore(engine) for _ in range(4)]
    done = await asyncio.gather(*(store.write(records) for store in stores))
    assert sum(one.written for one in done) == 300
    assert await logged(engine) == ids(records)


async def test_a_record_of_a_version_with_fewer_columns_is_a_row(engine: AsyncEngine) -> None:
    short = orjson.dumps(orjson.loads(record())[:-3])
    assert await ExecutionStore(engine).write([short]) == Stored(1, 0, 0)


POISON: dict[str, tuple[bytes, set[str]]] = {
    "NUL in a text": (record(subject="a\x00b"), {"22P05"}),
    "NUL in a payload": (record(result={"text": ["\x00"]}), {"22P05"}),
    "a lone surrogate": (record(subject="SURROGATE").replace(b"SURROGATE", b"\\ud800"), {"22P02"}),
    "bytes that are no UTF-8": (record(subject="BYTES").replace(b"BYTES", b"\xff"), {"22021", "22P02"}),
    "9 KB in an indexed column": (record(tenant="t" * 9_000), {"23514"}),
    "9 KB that compress badly": (record(tool_id="".join(random.Random(1).choices("abcdefgh", k=9_000))), {"23514"}),
    "50,000 levels": (
        record(result="DEEP").replace(b'"DEEP"', b"[" * 50_000 + b"]" * 50_000),
        {"54001", "22P02"},
    ),
    "half a record": (record()[:-20], {"22P02"}),
    "no id": (record(execution_id="nothing"), {"22P02"}),
    "no tenant": (record(tenant=None), {"23502"}),
    "a cost past 64 bits": (record(cost="COST").replace(b'"COST"', b"9223372036854775808"), {"22003"}),
    "a time past the calendar": (record(started_at=1e300), {"22008", "22003"}),
}


@pytest.mark.parametrize("kind", POISON)
async def test_a_record_that_the_database_refuses_is_parked_and_the_rest_lands(engine: AsyncEngine, kind: str) -> None:
    poison, states = POISON[kind]
    good = [record() for _ in range(9)]
    assert await ExecutionStore(engine).write([*good[:4], poison, *good[4:]]) == Stored(9, 0, 1)
    assert await logged(engine) == ids(good)
    ((kept, state, reason),) = await rows(engine, "SELECT record, sqlstate, reason FROM tool_executions_dead")
    assert kept == poison
    assert state in states
    assert len(reason) < 80 and "tttt" not in reason


async def test_a_hundred_poison_rows_among_ten_thousand_are_parked_once_and_no_other_is_lost(
    engine: AsyncEngine,
) -> None:
    records = [record() for _ in range(10_000)]
    poisoned = random.Random(4).sample(range(10_000), 100)
    for number in poisoned:
        records[number] = record(result={"text": "\x00"}) if number % 2 else record(tenant="t" * 9_000)
    good = [one for number, one in enumerate(records) if number not in set(poisoned)]
    store = ExecutionStore(engine)
    for _ in range(2):
        stored = [await store.write(records[start : start + 1_000]) for start in range(0, 10_000, 1_000)]
        assert sum(one.parked for one in stored) == 100
    assert await logged(engine) == ids(good)
    dead = await rows(engine, "SELECT execution_id FROM tool_executions_dead ORDER BY 1")
    assert [one[0] for one in dead] == ids([records[number] for number in poisoned])


# Months


async def by_table(engine: AsyncEngine) -> dict[str, str]:
    """Which partition has which tool_id."""
    return dict(await rows(engine, "SELECT tool_id, tableoid::regclass::text FROM tool_executions"))


async def test_ids_at_the_edges_of_months_land_in_their_months(pg: AsyncEngine) -> None:
    this = Month.of(time.time())
    following = this.plus(1)
    await ExecutionStore(pg).write(
        [
            record(tool_id="first", execution_id=this.first_id),
            record(tool_id="last", execution_id=id_at(following.starts_s - 0.001)),
            record(tool_id="next", execution_id=following.first_id),
            record(tool_id="before", execution_id=id_at(this.starts_s - 0.001)),
            record(tool_id="ahead", at=this.plus(3).starts_s),
            record(tool_id="too early", at=0),
            record(tool_id="too late", execution_id="ffffffff-ffff-7fff-bfff-ffffffffffff"),
            record(tool_id="random", execution_id="f47ac10b-58cc-4372-a567-0e02b2c3d479"),
        ]
    )
    assert await by_table(pg) == {
        "first": this.table,
        "last": this.table,
        "next": following.table,
        "before": this.plus(-1).table,
        "ahead": this.plus(3).table,
        "too early": "tool_executions_other",
        "too late": "tool_executions_other",
        "random": "tool_executions_other",
    }


@pytest.mark.parametrize("month", [Month(2026, 11), Month(2026, 12), Month(2027, 1), Month(2028, 2)])
def test_a_month_ends_where_the_next_begins(month: Month) -> None:
    assert Month.of(month.starts_s) == month
    assert Month.of(month.plus(1).starts_s - 0.001) == month
    assert month.plus(1).plus(-1) == month
    assert month.plus(12) == Month(month.year + 1, month.month)


async def test_a_month_takes_over_the_rows_that_came_before_it_was_made(pg: AsyncEngine) -> None:
    later = Month.of(time.time()).plus(6)
    records = [record(at=later.starts_s + number, tool_id=f"tool-{number}") for number in range(50)]
    other = record(at=0, tool_id="too early")
    await ExecutionStore(pg).write([*records, other])
    assert set((await by_table(pg)).values()) == {"tool_executions_other"}
    made = await ensure_partitions(pg, later.starts_s)
    assert made == [later.plus(step).table for step in range(-1, 4)][made == [] :]
    tables = await by_table(pg)
    assert tables.pop("too early") == "tool_executions_other"
    assert set(tables.values()) == {later.table}
    assert await ExecutionStore(pg).write(records) == Stored(0, 50, 0)


async def test_of_ten_that_make_months_at_once_each_month_is_made_once(pg: AsyncEngine) -> None:
    at = Month.of(time.time()).plus(12).starts_s
    made = await asyncio.gather(*(ensure_partitions(pg, at) for _ in range(10)))
    names = [name for some in made for name in some]
    missing = await ensure_partitions(pg, at)
    assert sorted(names + missing) == [Month.of(at).plus(step).table for step in range(-1, 4)]


async def test_inserts_go_on_while_a_month_is_made(pg: AsyncEngine) -> None:
    at = Month.of(time.time()).plus(12).starts_s
    store = ExecutionStore(pg)
    making = asyncio.create_task(ensure_partitions(pg, at))
    written = 0
    while not making.done():
        written += (await store.write([record(), record(at=at)])).written
    assert await making
    assert len(await logged(pg)) == written >= 2


async def test_where_no_partition_takes_a_row_one_is_made(pg: AsyncEngine) -> None:
    this = Month.of(time.time())
    await run(pg, "DROP TABLE tool_executions_other", f"DROP TABLE {this.table}")
    assert await ExecutionStore(pg).write([record()]) == Stored(1, 0, 0)
    assert await ExecutionStore(pg).write([record(at=0)]) == Stored(1, 0, 0)


async def test_a_month_that_was_detached_stays_out_and_others_are_made(pg: AsyncEngine) -> None:
    last = Month.of(time.time()).plus(-1)
    await run(pg, f"ALTER TABLE tool_executions DETACH PARTITION {last.table}")
    await run(pg, f"DROP TABLE {last.plus(4).table}")
    assert await ensure_partitions(pg, time.time()) == [last.plus(4).table]
    assert await ExecutionStore(pg).write([record(at=last.starts_s, tool_id="late")]) == Stored(1, 0, 0)
    assert await by_table(pg) == {"late": "tool_executions_other"}


async def test_months_past_retention_are_dropped_whole_and_no_other(pg: AsyncEngine) -> None:
    this = Month.of(time.time())
    for step in range(-5, 0):
        await ensure_partitions(pg, this.plus(step).starts_s)
    records = [record(at=this.plus(step).starts_s, tool_id=str(step)) for step in range(-5, 1)]
    strays = [record(execution_id=f"f47ac10b-58cc-4372-a567-{n:012x}", at=this.plus(-5).starts_s) for n in range(3)]
    await ExecutionStore(pg).write([*records, *strays])
    # All but the first millisecond of the month before last is past: it stays.
    dropped = await drop_partitions(pg, this.plus(-1).starts_s - 0.001)
    assert dropped == [this.plus(step).table for step in range(-6, -2)]
    assert sorted(await by_table(pg)) == ["-1", "-2", "0"]
    assert await drop_partitions(pg, this.plus(-1).starts_s) == [this.plus(-2).table]


async def test_what_is_past_retention_goes_with_its_dead_letters(engine: AsyncEngine) -> None:
    store, now = ExecutionStore(engine), time.time()
    old = [record(at=now - 200 * DAY_S) for _ in range(5_000)]
    new = [record(at=now - 10 * DAY_S), record()]
    await store.write(old[:2_500])
    await store.write(old[2_500:])
    await store.write([*new, record(tenant=None)])
    await Upkeep(engine, retention_days=90).once()
    assert await logged(engine) == ids(new)
    assert len(await rows(engine, "SELECT 1 FROM tool_executions_dead")) == 1
    on_postgresql = engine.dialect.name == "postgresql"
    age = "interval '100 days'" if on_postgresql else f"{100 * DAY_S * 1e6:.0f}"
    await run(engine, f"UPDATE tool_executions_dead SET at = at - {age}")
    await Upkeep(engine, retention_days=90).once()
    assert await rows(engine, "SELECT 1 FROM tool_executions_dead") == []


async def test_a_replica_whose_clock_is_years_ahead_drops_nothing(
    pg: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    new = [record(), record(execution_id="f47ac10b-58cc-4372-a567-0e02b2c3d479")]
    await ExecutionStore(pg).write([*new, record(tenant=None)])
    ahead_s = 20 * 365 * DAY_S
    await Upkeep(pg, retention_days=90, now=lambda: time.time() + ahead_s).once()
    assert await logged(pg) == ids(new)
    assert len(await rows(pg, "SELECT 1 FROM tool_executions_dead")) == 1
    (said,) = [line for line in caplog.records if line.message.startswith("clock differs")]
    assert vars(said)["ahead_s"] == pytest.approx(ahead_s, abs=60)


async def test_months_of_a_clock_that_was_never_set_begin_where_ids_do(pg: AsyncEngine) -> None:
    assert await ensure_partitions(pg, 60.0) == [f"tool_executions_1970_{month:02d}" for month in range(1, 5)]
    await ExecutionStore(pg).write([record(at=60.0, tool_id="early")])
    assert await by_table(pg) == {"early": "tool_executions_1970_01"}


async def test_a_drop_does_not_wait_for_a_reader_for_longer_than_inserts_may(pg: AsyncEngine) -> None:
    """The reader ends after the drop gave up: so it was not the reader's end that let it go."""
    ahead = Month.of(time.time()).plus(4).starts_s
    async with pg.connect() as reader:
        await reader.exec_driver_sql("SELECT 1 FROM tool_executions LIMIT 1")
        with pytest.raises(asyncpg.LockNotAvailableError):
            await drop_partitions(pg, ahead)
    assert await ExecutionStore(pg).write([record()]) == Stored(1, 0, 0)


# The database away


async def still_works(store: ExecutionStore, records: list[bytes]) -> Stored:
    """The batch lands within a bounded number of tries, without anything being made anew."""
    async with asyncio.timeout(SOON_S):
        while True:
            try:
                return await store.write(records)
            except StoreAway:
                await asyncio.sleep(0.05)


async def test_a_server_that_is_killed_is_away_and_then_takes_the_same_batch(own_postgres: PostgresServer) -> None:
    async with database(own_postgres.create_database()) as engine:
        store, records = ExecutionStore(engine), [record() for _ in range(100)]
        await store.write(records[:50])
        own_postgres.kill()
        for _ in range(3):
            with pytest.raises(StoreAway):
                await store.write(records)
        own_postgres.start()
        assert await still_works(store, records) == Stored(50, 50, 0)
        assert await logged(engine) == ids(records)


async def test_a_server_that_stands_still_is_away_in_bounded_time_and_leaves_no_connection(
    own_postgres: PostgresServer,
) -> None:
    async with database(own_postgres.create_database(), pool_size=2) as engine:
        store, hasty = ExecutionStore(engine), ExecutionStore(engine, timeout_s=0.5)
        records = [record() for _ in range(100)]
        await store.write(records[:50])
        tasks = len(asyncio.all_tasks())
        own_postgres.pause()
        try:
            for _ in range(3):
                async with asyncio.timeout(SOON_S):
                    with pytest.raises(StoreAway, match="within"):
                        await hasty.write(records)
            assert engine.pool.checkedout() == 0
        finally:
            own_postgres.resume()
        assert await still_works(store, records) == Stored(50, 50, 0)
        assert len(asyncio.all_tasks()) == tasks


async def test_a_batch_that_waits_for_a_lock_is_given_up_by_the_server_too_and_lands_later(pg: AsyncEngine) -> None:
    """Else every try would leave a process at the server, which waits for the lock as well."""
    hasty, records = ExecutionStore(pg, timeout_s=1.0), [record() for _ in range(10)]
    async with pg.begin() as other:
        await other.exec_driver_sql("LOCK TABLE tool_executions IN ACCESS EXCLUSIVE MODE")
        for _ in range(3):
            with pytest.raises(StoreAway):
                await hasty.write(records)
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        async with asyncio.timeout(SOON_S):  # a server that is slower than we are gives up a moment after us
            while (await other.exec_driver_sql(waiting)).scalar_one():
                await asyncio.sleep(0.05)
    assert await still_works(ExecutionStore(pg), records) == Stored(10, 0, 0)


async def test_a_read_only_database_is_away(own_postgres: PostgresServer) -> None:
    url = own_postgres.create_database()
    async with database(url) as engine:
        store, records = ExecutionStore(engine), [record(), record(tenant=None)]
        own_postgres.run_sql("ALTER SYSTEM SET default_transaction_read_only = on")
        own_postgres.run_sql("SELECT pg_reload_conf()")
        with pytest.raises(StoreAway) as refused:
            await until_away(store)
        assert refused.value.sqlstate == "25006"
        own_postgres.run_sql("ALTER SYSTEM RESET default_transaction_read_only")
        own_postgres.run_sql("SELECT pg_reload_conf()")
        assert (await still_works(store, records)).parked == 1


async def until_away(store: ExecutionStore) -> None:
    """Settings of the server reach its processes a moment later."""
    async with asyncio.timeout(SOON_S):
        while True:
            await store.write([record()])


async def test_a_server_without_free_connections_is_away() -> None:
    with PostgresServer(max_connections="4", superuser_reserved_connections="0") as server:
        url = server.create_database()
        async with database(url) as engine:
            await engine.dispose()
            store, taken = ExecutionStore(engine), [await asyncpg.connect(driver_url(url), ssl=False) for _ in range(4)]
            with pytest.raises(StoreAway) as refused:
                await store.write([record()])
            assert "too many clients" in refused.value.reason
            for one in taken:
                await one.close()
            assert await still_works(store, [record()]) == Stored(1, 0, 0)


def driver_url(url: str) -> str:
    return url.replace("+asyncpg", "")


async def test_a_table_that_is_missing_is_away_until_it_is_there(database_url: str) -> None:
    engine = create_engine(database_url, 2, 0)
    try:
        store, records = ExecutionStore(engine), [record() for _ in range(3)]
        with pytest.raises(StoreAway):
            await store.write(records)
        await migration.migrate(engine)
        assert await store.write(records) == Stored(3, 0, 0)
    finally:
        await engine.dispose()


async def test_an_idle_connection_that_the_server_ended_is_replaced(pg: AsyncEngine) -> None:
    store = ExecutionStore(pg)
    await store.write([record()])
    server: Any = await asyncpg.connect(driver_url(pg.url.render_as_string(hide_password=False)), ssl=False)
    await server.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    await server.close()
    assert await store.write([record()]) == Stored(1, 0, 0)


async def test_a_sqlite_file_that_another_holds_is_away(tmp_path: Any) -> None:
    async with database(f"sqlite+aiosqlite:///{tmp_path / 'log.db'}") as engine:

        @event.listens_for(engine.sync_engine, "checkout")
        def lose_patience(connection: Any, *_: object) -> None:
            connection.cursor().execute("PRAGMA busy_timeout = 50")

        store = ExecutionStore(engine)
        async with engine.connect() as other:
            await other.exec_driver_sql("BEGIN IMMEDIATE")
            with pytest.raises(StoreAway, match="locked"):
                await store.write([record()])
            await other.rollback()
        assert await store.write([record()]) == Stored(1, 0, 0)


async def test_a_sqlite_statement_that_takes_too_long_is_interrupted_and_the_next_one_works(tmp_path: Any) -> None:
    async with database(f"sqlite+aiosqlite:///{tmp_path / 'log.db'}") as engine:
        endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
        async with asyncio.timeout(SOON_S):
            with pytest.raises(StoreAway, match="interrupted"):
                async with opened(engine, 0.1) as connection:
                    await connection.exec_driver_sql(endless)
        assert await ExecutionStore(engine).write([record()]) == Stored(1, 0, 0)
