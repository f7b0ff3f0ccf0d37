"""A plan made for the card without it serves on it."""

from __future__ import annotations

import pytest

from benchmarks.device_check.bench import Bench
from benchmarks.device_check.portable import check_portable

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


def test_a_plan_from_stand_ins_is_the_plan_of_the_card(bench: Bench) -> None:
    """Through JSON it has the card's own fingerprint, and the model on the card takes it."""
    row = check_portable(bench)
    assert not row.refused
    assert row.without_device == row.here
