"""The promise that a record is kept: one object for all records of a tick.

Made by the journal, held by the executor and the doors. Knows no file.
"""

from __future__ import annotations

from app.stepping import Signal


class Commit(Signal):
    """What a failing disk means for an answer is the journal's affair: it is completed all the same."""

    __slots__ = ()


COMMITTED = Commit(done=True)
"""For what promises nothing, or has kept its promise already."""
