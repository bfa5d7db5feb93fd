"""What tests of memory measure it with."""

import pytest
from torch.profiler import ProfilerActivity, profile


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
