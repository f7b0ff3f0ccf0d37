"""What every test of compiled steps starts from: no choice of an earlier test or session."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner.compiled import kept_choices


@pytest.fixture(autouse=True)
def choices_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where choices are kept during the test; each test has its own."""
    folder = tmp_path / "inductor"
    monkeypatch.setattr(kept_choices, "inductor_cache_folder", lambda: str(folder))
    return folder
