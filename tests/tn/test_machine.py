"""Which constants the planner's estimates are made of."""

import pytest

from kfac_tn.tn import gemm
from kfac_tn.tn.machine import MACHINES, kind, machine


@pytest.mark.parametrize("processor", ["intel", "zen4", "cpu"])
def test_each_kind_of_processor_has_its_own(processor, monkeypatch):
    monkeypatch.setattr(gemm, "PROCESSOR", processor)
    assert kind("cpu") == kind("mps") == kind("intel") == processor
    assert kind("cuda") == "cuda"
    assert machine("cpu") is MACHINES[processor]
