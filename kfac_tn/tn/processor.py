"""What processor this is, as far as it matters to products of matrices."""

from __future__ import annotations

import platform
import re
from itertools import islice

ZEN_5 = 26
"""The first family of AMD's processors that multiply 512 bits at once."""


def processor(description: str = "/proc/cpuinfo") -> str:
    """The kind of processor.

    Args:
        description: Where Linux describes it, in the first lines. Where there is no such file, it
            is what Python says.

    Returns:
        `"intel"`; `"zen4"` for AMD's up to that, which multiply 256 bits at once; `"cpu"` for all
        others, and if nobody tells.
    """
    try:
        with open(description) as lines:
            said = "".join(islice(lines, 20))
    except OSError:
        said = platform.processor()
    if "GenuineIntel" in said:
        return "intel"
    family = re.search(r"family\s*:?\s*(\d+)", said, re.IGNORECASE)
    old = family is not None and int(family[1]) < ZEN_5
    return "zen4" if "AuthenticAMD" in said and old else "cpu"
