"""NaN and infinity, which the libraries write as null and JSON cannot hold. Knows no schema."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections import deque
from typing import Any

ARRAYS = (list, tuple, set, frozenset, deque)


def hides_non_finite(value: Any, form: Any) -> bool:
    """Whether a NaN or an infinity in the value is null in its JSON form, and no text that the author chose.

    Only called on what was written already, so it ends.
    """
    if isinstance(value, float):
        return not (math.isfinite(value) or isinstance(form, str))
    if isinstance(value, dict) and isinstance(form, dict):
        return any(map(hides_non_finite, value.values(), form.values()))
    if isinstance(value, ARRAYS) and isinstance(form, ARRAYS):
        return any(map(hides_non_finite, value, form))
    if isinstance(value, enum.Enum):
        return hides_non_finite(value.value, form.value if isinstance(form, enum.Enum) else form)
    if dataclasses.is_dataclass(value):  # only orjson takes one as it is, so what it holds is its own form
        return any(hides_non_finite(held, held) for name, held in attributes(value).items() if name[0] != "_")
    return False


def attributes(value: Any) -> dict[str, Any]:
    """All that a dataclass has, though it be no field. orjson writes what is not private, pydantic the fields."""
    fields = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    return fields | getattr(value, "__dict__", {})
