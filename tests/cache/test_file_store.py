"""Records in a file: shared by processes, bounded, kept through a crash, and away without harm."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from app.cache.file_store import LOOKED_EVERY, SWEEP_EVERY, SWEPT_MAX, FileStore
from app.cache.store import KEPT_MS, StoreAway, StoreFull
from app.off_loop import THREADS_MAX, off_loop
from tests.cache.stores import LEASE_MS, Clock
from tests.conftest import ROOT

pytestmark = pytest.mark.anyio

BUSY = """
import asyncio, pathlib, sys
from app.cache.file_store import FileStore

async def main():
    store = FileStore(pathlib.Path(sys.argv[1]))
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(100):
        claim = await store.begin(str(number), "fp", sys.argv[2], 60_000, take_over=False)
        if claim.state == "begun":
            print(number, flush=True)
            await store.finish(str(number), "fp", sys.argv[2], b"x")
    print("done", flush=True)
    sys.stdin.readline()

asyncio.run(main())
"""


def busy(path: Path, token: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUSY, str(path), token], cwd=ROOT, stdin=-1, stdout=-1, text=True, bufsize=1
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")


async def test_two_processes_begin_each_key_once_and_a_kill_loses_nothing(tmp_path: Path) -> None:
    """They open the new file at the same moment, too."""
    path = tmp_path / "keys.db"
    with busy(path, "one") as one, busy(path, "two") as two:
        for process in (one, two):
            assert said(process) == "ready"
        for process in (one, two):
            go_on(process)
        began: dict[str, list[str]] = {"one": [], "two": []}
        for name, process in (("one", one), ("two", two)):
            while (line := said(process)) != "done":
                began[name].append(line)
        for process in (one, two):
            process.send_signal(signal.SIGKILL)
    assert sorted(began["one"] + began["two"]) == sorted(str(number) for number in range(100))
    store = FileStore(path)
    for name, numbers in began.items():
        for number in numbers:
            claim = await store.begin(number, "fp", "later", 60_000, take_over=True)
            assert (claim.state, claim.token, claim.body) == ("done", name, b"x")
    await store.close()


async def test_a_full_file_says_so_keeps_what_it_has_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    clock = Clock()
    store = FileStore(tmp_path / "keys.db", clock, bytes_max=200_000)
    with pytest.raises(StoreFull):
        for number in range(1_000):
            await store.begin(str(number), "fp", "token", LEASE_MS, take_over=False)
            await store.finish(str(number), "fp", "token", b"x" * 5_000)
    assert (await store.begin("0", "fp", "later", LEASE_MS, take_over=False)).body == b"x" * 5_000
    size = sum(path.stat().st_size for path in tmp_path.iterdir() if path.name == "keys.db")
    assert size <= 200_000
    clock.ms += KEPT_MS
    begun = 0
    for number in range(SWEEP_EVERY + 1):  # within so many claims the old ones go
        try:
            begun += (await store.begin(f"new {number}", "fp", "token", LEASE_MS, take_over=False)).state == "begun"
        except StoreFull:
            continue
    assert begun
    await store.close()


async def filled(store: FileStore, tenant: str, from_number: int = 0) -> int:
    """Keys that the tenant got until one was refused; each outcome was kept."""
    for number in range(from_number, 10_000):
        try:
            await store.begin(f"{{{tenant}}}{number}", "fp", "token", LEASE_MS, take_over=False)
        except StoreFull:
            return number - from_number
        await store.finish(f"{{{tenant}}}{number}", "fp", "token", b"x" * 5_000)
    raise AssertionError("never refused")


async def test_one_tenant_leaves_room_in_the_file_for_others_keys_and_for_what_came_of_its_own(tmp_path: Path) -> None:
    path, bytes_max = tmp_path / "keys.db", 4_000_000
    store = FileStore(path, Clock(), bytes_max)
    await store.begin("{one}first", "fp", "token", LEASE_MS, take_over=False)
    first = await filled(store, "one")
    assert first * 5_000 > bytes_max / 2, "alone it has most of it"
    assert await store.finish("{one}first", "fp", "token", b"x" * 50_000), "this one was let in before"
    assert await filled(store, "two") > 20
    assert await filled(store, "three") > 5
    assert (await store.begin("{one}0", "fp", "later", LEASE_MS, take_over=False)).state == "done"
    await store.close()
    again = FileStore(path, Clock(), bytes_max)  # it counts what others wrote
    assert await filled(again, "one", first) < LOOKED_EVERY
    await again.close()


async def test_a_sweep_removes_a_bounded_part_at_a_time(tmp_path: Path) -> None:
    clock = Clock()
    path = tmp_path / "keys.db"
    store = FileStore(path, clock)
    await store.begin("first", "fp", "token", LEASE_MS, take_over=False)
    with sqlite3.connect(path) as file:
        old = ((f"old {number}", clock.ms - 1) for number in range(SWEPT_MAX + 10))
        file.executemany("INSERT INTO records (key, fp, token, lease_ms, ends_ms) VALUES (?, '', '', 0, ?)", old)

    def left() -> int:
        counted: tuple[int] = file.execute("SELECT count(*) FROM records WHERE key LIKE 'old %'").fetchone()
        return counted[0]

    seen = []
    for number in range(2 * SWEEP_EVERY):
        await store.begin(f"new {number}", "fp", "token", LEASE_MS, take_over=False)
        if not seen or left() != seen[-1]:
            seen.append(left())
    assert seen == [SWEPT_MAX + 10, 10, 0]
    file.close()
    await store.close()


async def test_who_holds_the_file_for_long_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "keys.db"
    store = FileStore(path)
    await store.begin("first", "fp", "token", LEASE_MS, take_over=False)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreAway, match="locked"):
        await store.begin("second", "fp", "token", LEASE_MS, take_over=False)
    other.execute("ROLLBACK")
    assert (await store.begin("second", "fp", "token", LEASE_MS, take_over=False)).state == "begun"
    other.close()
    await store.close()


async def test_a_file_that_takes_long_to_open_keeps_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.cache.file_store.OPEN_S_MAX", 60.0)
    path = tmp_path / "keys.db"
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    store = FileStore(path)
    claims = [
        asyncio.ensure_future(store.begin(str(number), "fp", "token", LEASE_MS, take_over=False))
        for number in range(2 * THREADS_MAX)
    ]
    await asyncio.sleep(0)
    await off_loop(lambda: None)
    assert not any(claim.done() for claim in claims), "other work did not wait for them"
    other.execute("ROLLBACK")
    assert {claim.state for claim in await asyncio.gather(*claims)} == {"begun"}
    other.close()
    await store.close()


NO_THREAD = """
import asyncio, pathlib, sys, threading
from app.cache.file_store import FileStore
from app.cache.store import StoreAway

async def main():
    store = FileStore(pathlib.Path(sys.argv[1]))
    before = threading.stack_size(sys.maxsize // 2 + 1)
    try:
        await store.begin("key", "fp", "token", 60_000, take_over=False)
    except StoreAway as away:
        print(away)
    threading.stack_size(before)
    print((await store.begin("key", "fp", "token", 60_000, take_over=False)).state)

asyncio.run(main())
"""
"""More stack than there are addresses: the system refuses, as it does at a limit of processes."""


def test_a_file_that_no_thread_can_open_is_away_and_back_with_the_next(tmp_path: Path) -> None:
    command = [sys.executable, "-c", NO_THREAD, str(tmp_path / "keys.db")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.stdout == "no thread to work in\nbegun\n", ended.stderr


async def test_a_store_that_closes_while_its_file_opens_leaves_none_open(tmp_path: Path) -> None:
    path = tmp_path / "keys.db"
    store = FileStore(path)
    claim = asyncio.ensure_future(store.begin("key", "fp", "token", LEASE_MS, take_over=False))
    await asyncio.sleep(0)
    await store.close()
    with pytest.raises(StoreAway, match="closed"):
        await claim
    with pytest.raises(StoreAway, match="closed"):
        await store.begin("key", "fp", "token", LEASE_MS, take_over=False)
    assert str(path) not in {os.path.realpath(fd) for fd in Path("/proc/self/fd").iterdir()}


async def test_a_file_that_is_none_and_a_folder_that_cannot_be_are_a_store_that_is_away(tmp_path: Path) -> None:
    broken = tmp_path / "broken.db"
    broken.write_bytes(b"not a database " * 1_000)
    (tmp_path / "taken").touch()
    for path in (broken, tmp_path / "taken" / "keys.db"):
        store = FileStore(path)
        for _ in range(2):
            with pytest.raises(StoreAway):
                await store.begin("key", "fp", "token", LEASE_MS, take_over=False)
        await store.close()
    assert broken.read_bytes() == b"not a database " * 1_000


async def test_the_file_is_made_with_the_first_claim_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "keys.db"
    store = FileStore(path)
    assert not path.parent.exists()
    await asyncio.gather(*(store.begin(str(n), "fp", "token", LEASE_MS, take_over=False) for n in range(20)))
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert {stat.S_IMODE(one.stat().st_mode) for one in path.parent.iterdir()} == {0o600}
    await store.close()
    with pytest.raises(StoreAway, match="closed"):
        await store.begin("late", "fp", "token", LEASE_MS, take_over=False)


async def test_a_file_that_was_taken_away_is_made_again_for_what_comes_and_for_what_runs(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "keys.db"
    store = FileStore(path)
    await store.begin("running", "fp", "token", LEASE_MS, take_over=False)
    shutil.rmtree(path.parent)
    assert await store.finish("running", "fp", "token", b"x")
    await store.begin("later", "fp", "token", LEASE_MS, take_over=False)
    await store.close()
    store = FileStore(path)
    states = [(await store.begin(key, "fp", "other", LEASE_MS, take_over=False)).state for key in ("running", "later")]
    assert states == ["done", "running"]
    await store.close()
