"""`make audit` and `make sbom` fail when they looked at nothing, or at less than the image has."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.deploy.supply_chain import audit, audit_problems, for_every_platform, locked, sbom, sbom_problems

LOCK = """\
alpha==1.0 ; sys_platform == 'win32' \\
    --hash=sha256:aa \\
    --hash=sha256:bb
    # via beta==9
beta-two[extra]==2.0 \\
    --hash=sha256:cc
"""

HASHES = [{"alg": "SHA-256", "content": "aa"}]
SEEN = [{"name": "alpha", "version": "1.0", "vulns": []}, {"name": "Beta_Two", "version": "2.0", "vulns": []}]


def test_a_lock_is_read_with_its_conditions_and_without_its_comments() -> None:
    assert locked(LOCK) == {"alpha": "1.0", "beta-two": "2.0"}
    whole = for_every_platform(LOCK)
    assert "win32" not in whole and locked(whole) == locked(LOCK) and whole.count("--hash") == 3


def test_the_real_lock_has_a_hash_for_every_package() -> None:
    entries = re.split(r"^(?=\w)", (ROOT / "requirements" / "runtime.txt").read_text(), flags=re.MULTILINE)[1:]
    assert len(locked("".join(entries))) == len(entries) > 50
    assert all("--hash=sha256:" in entry for entry in entries)


def test_all_looked_at_and_nothing_found_is_good() -> None:
    assert audit_problems(LOCK, {"dependencies": SEEN}) == []
    components = [{**one, "hashes": HASHES} for one in SEEN]
    assert sbom_problems(LOCK, {"components": components}) == []


@pytest.mark.parametrize(
    "dependencies",
    [
        [],
        SEEN[:1],
        [SEEN[0], {**SEEN[1], "version": "1.9"}],
        [SEEN[0], {"name": "beta-two", "version": "2.0", "skip_reason": "not found"}],
        [SEEN[0], {**SEEN[1], "vulns": [{"id": "CVE-1", "fix_versions": ["2.1"]}]}],
    ],
    ids=["nothing", "fewer", "another version", "skipped", "vulnerable"],
)
def test_an_audit_that_is_not_of_everything_or_finds_something_fails(dependencies: list[dict[str, Any]]) -> None:
    assert audit_problems(LOCK, {"dependencies": dependencies})


@pytest.mark.parametrize("components", [[], [{**SEEN[0], "hashes": HASHES}], SEEN], ids=["nothing", "fewer", "no hash"])
def test_a_list_that_is_not_of_everything_fails(components: list[dict[str, Any]]) -> None:
    assert sbom_problems(LOCK, {"components": components})


def test_an_empty_lock_fails() -> None:
    assert audit_problems("", {"dependencies": []}) and sbom_problems("", {"components": []})


def program(folder: Path, name: str, says: str, report: object, code: int = 0) -> None:
    """A stand-in for a program: writes a report where it is told to, and ends."""
    text = f"""#!{sys.executable}
import sys
to = sys.argv[sys.argv.index("--output" if "--output" in sys.argv else "--output-file") + 1]
open(to, "w").write({json.dumps(report) if report is not None else ""!r})
print({says!r}, file=sys.stderr)
sys.exit({code})
"""
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def test_an_audit_whose_database_is_away_fails_whatever_the_program_says(tmp_path: Path) -> None:
    """pip-audit exits 0 then, with these words."""
    lock = tmp_path / "lock.txt"
    lock.write_text(LOCK)
    skipped = [{"name": one["name"], "version": one["version"], "skip_reason": "not found"} for one in SEEN]
    program(tmp_path, "pip-audit", "No known vulnerabilities found", {"dependencies": skipped})
    assert "the vulnerability database did not answer" in audit(tmp_path, lock)[-1]
    program(tmp_path, "pip-audit", "connection refused", None, code=1)
    assert "the vulnerability database cannot be reached" in audit(tmp_path, lock)[0]
    program(tmp_path, "pip-audit", "No known vulnerabilities found", {"dependencies": SEEN})
    assert audit(tmp_path, lock) == []


def test_an_old_list_is_not_taken_for_a_new_one(tmp_path: Path) -> None:
    lock, to = tmp_path / "lock.txt", tmp_path / "dist" / "sbom.json"
    lock.write_text(LOCK)
    program(tmp_path, "cyclonedx-py", "", {"components": [{**one, "hashes": HASHES} for one in SEEN]})
    assert sbom(tmp_path, lock, to) == []
    program(tmp_path, "cyclonedx-py", "refused", None, code=2)
    assert sbom(tmp_path, lock, to) == ["no list was made"]


def test_the_target_fails_with_the_command(tmp_path: Path) -> None:
    program(tmp_path, "pip-audit", "No known vulnerabilities found", {"dependencies": []})
    command = [sys.executable, "-m", "tests.deploy.supply_chain", "audit", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "was not checked" in done.stderr
