"""What the tests of parameters and of results share: types, JSON of any shape, and a text that no error may tell."""

from __future__ import annotations

import enum

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from typing_extensions import TypedDict

CANARY = "c4n4ry"


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Place(TypedDict):
    lat: float


unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""The first example builds tables of Unicode, which takes a second on a busy machine."""

json_values = st.recursive(
    # floats: JSON Schema has whole numbers of any size as integers, this service those of 64 bits
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(-(2.0**62), 2.0**62) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
