"""What the documents say, read."""

from __future__ import annotations

import re
from pathlib import Path

from tests.conftest import ROOT

DOCS = ROOT / "docs"


def table_rows(path: Path, heading: str | None = None) -> list[list[str]]:
    """Cells of every table row of a document, or of one section of it."""
    text = path.read_text()
    if heading is not None:
        text = text.split(f"{heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("|---")]
    return [[cell.strip() for cell in re.split(r"(?<!\\\\)\|", row.strip().strip("|"))] for row in rows]
