"""A connection of the pool for a bounded time, whatever the server does, and what it means that there is none.

asyncpg asks a server that does not answer to cancel, and waits for that too: a command's timeout takes twice its time.
So nothing here is cancelled: when the time is up the connection is cut, which ends every wait on it at once. Knows no
table. Called by the store, the history and the keeper of partitions.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.clients import DATABASE_ERRORS, reason

CHECKOUT_TIMEOUT_S = 5.0
"""For a connection of the pool, its ping, and a new one to be opened."""


class StoreAway(Exception):
    """The database takes or gives no rows now, which says nothing about the rows. `sqlstate` when it said so itself."""

    def __init__(self, reason: str, sqlstate: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.sqlstate = sqlstate


def away(error: Exception) -> StoreAway:
    """What a failed statement means when the rows are not to blame."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    return StoreAway(reason(error), getattr(cause, "sqlstate", None))


@contextlib.asynccontextmanager
async def borrowed(engine: AsyncEngine, timeout_s: float) -> AsyncIterator[Any]:
    """asyncpg's own connection out of the pool, in autocommit; past its time every statement on it fails.

    SQLAlchemy's cursors would prepare, wrap rows and open a transaction: 0.5 ms of our CPU a batch. Raises StoreAway
    when there is no connection, or when it was lost or cut; other errors of the server pass.
    """
    connection = await _checked_out(engine, min(timeout_s, CHECKOUT_TIMEOUT_S))
    try:
        driver = (await connection.get_raw_connection()).driver_connection
        assert driver is not None
        late = False

        def give_up() -> None:
            nonlocal late
            late = True
            driver.terminate()

        cut = asyncio.get_running_loop().call_later(timeout_s, give_up)
        try:
            yield driver
        except BaseException as error:
            lost = driver.is_closed()
            if lost or not isinstance(error, asyncpg.PostgresError):
                driver.terminate()  # nobody knows what it still waits for
                await connection.invalidate()
            if not isinstance(error, DATABASE_ERRORS) or (isinstance(error, asyncpg.PostgresError) and not lost):
                raise
            raise (StoreAway(f"no answer within {timeout_s:g} s") if late else away(error)) from error
        finally:
            cut.cancel()
    finally:
        await connection.close()


async def _checked_out(engine: AsyncEngine, timeout_s: float) -> AsyncConnection:
    try:
        async with asyncio.timeout(timeout_s):
            return await engine.connect()
    except TimeoutError as error:
        raise StoreAway(f"no connection within {timeout_s:g} s") from error
    except DATABASE_ERRORS as error:
        raise away(error) from error


@contextlib.asynccontextmanager
async def opened(engine: AsyncEngine, timeout_s: float) -> AsyncIterator[AsyncConnection]:
    """A connection to SQLite, in a transaction that is committed at the end; past its time a query is interrupted."""
    try:
        async with engine.begin() as connection:
            driver = (await connection.get_raw_connection()).driver_connection
            assert driver is not None
            # aiosqlite's interrupt is a coroutine that waits for nothing: one step is all of it.
            cut = asyncio.get_running_loop().call_later(timeout_s, _step, driver.interrupt)
            try:
                yield connection
            finally:
                cut.cancel()
    except DBAPIError as error:
        if is_about_rows(error):
            raise
        raise away(error) from error
    except OSError as error:
        raise away(error) from error


def _step(coroutine_function: Any) -> None:
    with contextlib.suppress(StopIteration, ValueError):  # ValueError: closed meanwhile
        coroutine_function().send(None)


def is_about_rows(error: DBAPIError) -> bool:
    """Whether SQLite refused a value rather than the work: a constraint, a type, a size."""
    return type(error.orig).__name__ in {"IntegrityError", "DataError", "InterfaceError", "ProgrammingError"} or (
        isinstance(error.orig, OverflowError)
    )
