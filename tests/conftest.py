"""What every test starts from: fixed seeds, one torch thread, a hypothesis profile.

``FXPARAM_SEED`` sets the seed of torch, numpy and random before each test (default 0). ``FXPARAM_PROFILE`` picks the
hypothesis profile: ``ci`` is small and draws the same examples each time, ``large`` draws many (``make fuzz``). The
header of a run prints both, so that a failure can be had again.
"""

from __future__ import annotations

import os
import random

# Before torch is imported, and inherited by the processes that tests start: workers must not fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest
import torch

SEED = int(os.environ.get("FXPARAM_SEED", "0"))
PROFILE = os.environ.get("FXPARAM_PROFILE", "ci")

torch.set_num_threads(1)
# A slow machine is no failure, hence no deadline; the health check for slow data would be one by another name.
_patient = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True)
hypothesis.settings.register_profile("ci", _patient, max_examples=25, derandomize=True, database=None)
hypothesis.settings.register_profile("large", _patient, max_examples=2000)
hypothesis.settings.load_profile(PROFILE)


def pytest_report_header() -> str:
    """One line that says what a run depends on."""
    return f"fxparam: torch {torch.__version__}, FXPARAM_SEED={SEED}, FXPARAM_PROFILE={PROFILE}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start each test from the same random state, whatever ran before it."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
