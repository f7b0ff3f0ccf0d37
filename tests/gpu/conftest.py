"""One model at a time on the card, with the plans that its tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.device_check.bench import Bench, release
from benchmarks.device_check.subjects import SUBJECTS


@pytest.fixture(scope="session", params=list(SUBJECTS))
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """A model in the size for a card of 16 to 24 GB; needs a CUDA device."""
    device = torch.device("cuda", torch.cuda.current_device())
    made = Bench(subject=SUBJECTS[request.param]("small"), device=device, time_limit_s=15.0)
    yield made
    del made
    release(device)
