"""Which processor this is, as Linux describes it, or Python where nothing else does."""

import pytest

from kfac_tn.tn import processor as module
from kfac_tn.tn.processor import processor

LINUX = "processor\t: 0\nvendor_id\t: {}\ncpu family\t: {}\nmodel\t: 17\n"
PYTHON = "{0} Family {2} Model 17 Stepping 1, {1}"

KINDS = {
    "Intel's": (LINUX.format("GenuineIntel", 6), "", "intel"),
    "AMD's, 256 bits": (LINUX.format("AuthenticAMD", 25), "", "zen4"),
    "AMD's, 512 bits": (LINUX.format("AuthenticAMD", 26), "", "cpu"),
    "AMD's, unknown": ("vendor_id : AuthenticAMD\ncpu family : unknown", "", "cpu"),
    "the description goes first": (LINUX.format("AuthenticAMD", 25), "GenuineIntel", "zen4"),
    "another's": ("processor : 0\nCPU implementer : 0x41\nCPU architecture: 8\n", "", "cpu"),
    "empty": ("", "", "cpu"),
    "no description, Intel's": (None, PYTHON.format("Intel64", "GenuineIntel", 6), "intel"),
    "no description, AMD's": (None, PYTHON.format("AMD64", "AuthenticAMD", 25), "zen4"),
    "no description, AMD's newer": (None, PYTHON.format("AMD64", "AuthenticAMD", 26), "cpu"),
    "nothing at all": (None, "", "cpu"),
}


@pytest.mark.parametrize(("lines", "named", "expected"), KINDS.values(), ids=KINDS)
def test_kinds_of_processors(lines, named, expected, monkeypatch, tmp_path):
    description = tmp_path / "cpuinfo"
    if lines is not None:
        description.write_text(lines)
    monkeypatch.setattr(module.platform, "processor", lambda: named)
    assert processor(str(description)) == expected
