"""What all tests share: one thread for each process, the ways to draw and to measure memory."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch.profiler import ProfilerActivity, profile

# The tensors are tiny, and the test processes run side by side.
torch.set_num_threads(1)

# On a busy machine drawing takes its time. CI draws the same examples again and again; elsewhere
# they are new in every run.
settings.register_profile(
    "kfac_tn",
    deadline=None,
    max_examples=50,  # where a test says nothing else; `pytest -m slow` draws thousands
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="CI" in os.environ,
)
settings.load_profile("kfac_tn")


@pytest.fixture
def peak_bytes():
    """Most bytes allocated at once while a function runs, temporaries inside of torch included."""

    def measure(function):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            function()
        events = profiled.profiler.kineto_results.events()
        held = peak = 0
        for _, change in sorted(
            (e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"
        ):
            held += change
            peak = max(peak, held)
        return peak

    return measure
