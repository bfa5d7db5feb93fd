"""What all tests share: one thread for each process, and how hypothesis draws."""

import os

import torch
from hypothesis import HealthCheck, settings

# The tensors are tiny, and the test processes run side by side.
torch.set_num_threads(1)

# On a busy machine drawing takes its time. CI draws the same examples again and again; elsewhere
# they are new in every run.
settings.register_profile(
    "kfac_tn",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="CI" in os.environ,
)
settings.load_profile("kfac_tn")
