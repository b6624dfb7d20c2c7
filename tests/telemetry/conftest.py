"""Receivers of traces."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.otlp import OtlpReceiver


@pytest.fixture
def own_receiver() -> Iterator[OtlpReceiver]:
    """To be stalled, closed and told to refuse."""
    one = OtlpReceiver()
    yield one
    one.close()
