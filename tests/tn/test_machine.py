"""Which constants the planner's estimates are made of."""

import pytest

from kfac_tn.tn import gemm
from kfac_tn.tn.machine import MACHINES, kind, machine


@pytest.mark.parametrize(("suits", "processor"), [(True, "intel"), (False, "cpu")])
def test_processors_differ_by_what_blas_makes_of_them(suits, processor, monkeypatch):
    monkeypatch.setattr(gemm, "SUITS_BLAS", suits)
    assert kind("cpu") == kind("mps") == kind("intel") == processor
    assert kind("cuda") == "cuda"
    assert machine("cpu") is MACHINES[processor]
