"""What can be chosen about curvature that follows a training run."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from kfac_tn.capture import Fisher
from kfac_tn.columns import Samples, is_whole
from kfac_tn.curvature.intervals import Interval
from kfac_tn.distributed import ProcessGroup
from kfac_tn.layers import ApproximationChoice, CurvatureChoice, LargeFactors, LayerBlock

Split: TypeAlias = Literal["pi", "exact"]
OtherCurvature: TypeAlias = Literal["diagonal"]

NOISE = 10.0
"""By how much noisy factors are damped more, where nobody says otherwise."""

OVERHEAD = 0.25
"""What a step may cost more, where nobody says otherwise."""

Range: TypeAlias = Literal[
    "positive", "positive and finite", "in [0, inf)", "in [0, 1)", "in (0, 1)", "in [0, 1]"
]  # as messages say it

_RANGES: dict[Range, Callable[[Any], bool]] = {
    "positive": lambda x: x > 0,
    "positive and finite": lambda x: 0 < x < float("inf"),
    "in [0, inf)": lambda x: 0 <= x < float("inf"),
    "in [0, 1)": lambda x: 0 <= x < 1,
    "in (0, 1)": lambda x: 0 < x < 1,
    "in [0, 1]": lambda x: 0 <= x <= 1,
}


def within(value: Any, bounds: Range) -> bool:
    """Whether something is a number (also in a tensor) in a range; truth values aren't.

    Example:
        >>> [within(value, "in [0, 1)") for value in (0.5, torch.tensor(0.5), 1, True, "half")]
        [True, True, False, False, False]
    """
    if isinstance(value, Tensor):
        number = value.numel() == 1 and value.dtype is not torch.bool
    else:
        number = isinstance(value, Real) and not isinstance(value, bool)
    return number and bool(_RANGES[bounds](value))


def check_number(name: str, value: Any, bounds: Range, *others: object) -> None:
    """Refuse what is no number in a range.

    Args:
        name: Of the option.
        value: Its value.
        bounds: The range.
        others: What it may be instead.

    Raises:
        ValueError: Naming option and value.
    """
    if not any(value is other for other in others) and not within(value, bounds):
        raise ValueError(f"{name} is {value!r}: it must be {bounds}{_or(others)}.")


def check_whole(name: str, value: Any, *others: object) -> None:
    """Refuse what is no positive whole number, nor one of ``others``.

    Raises:
        ValueError: Naming option and value.
    """
    if value not in others and not (is_whole(value) and value >= 1):
        raise ValueError(f"{name} is {value!r}: it must be a positive whole number{_or(others)}.")


def _or(others: Collection[object]) -> str:
    return "".join(f", or {other!r}" for other in others)


def overhead_of(choice: float | None, *intervals: Interval) -> float:
    """The overhead chosen, or the default.

    Raises:
        ValueError: For one that isn't positive, or where no interval is ``"auto"``.
    """
    if choice is None:
        return OVERHEAD
    check_number("overhead", choice, "positive and finite")
    if "auto" not in intervals:
        raise ValueError(
            f"overhead={choice} is for factor_interval='auto' or inverse_interval='auto', but they "
            f"are {intervals[0]} and {intervals[1]}: leave it out, or give 'auto'."
        )
    return choice


@dataclass(frozen=True)
class CurvatureOptions:
    """What is estimated, and how often. See ``KFAC``, whose arguments and defaults these are.

    Attributes:
        approximation: ``"expand"``, ``"reduce"``, or by layer.
        curvature: ``"kfac"``, ``"ekfac"``, ``"diagonal"``, or by layer.
        max_dim: Dimension above which only a part of a factor is computed.
        large_factors: That part: ``"auto"``, ``"blocks"`` or ``"diagonal"``.
        fisher: The kind of Fisher.
        mc_samples: Samples for ``fisher="mc"``, or ``"auto"``.
        relative_damping: Whether damping is in units of each block's mean eigenvalue.
        noise_damping: By how much noisy factors are damped more; 0: as all others; None: by
            ``NOISE``, where there are such.
        damping_split: ``"pi"``: divided between the factors; ``"exact"``: added to their product.
        factor_decay: Decay of the factors' moving averages.
        factor_interval: Steps between statistics, or ``"auto"``.
        inverse_interval: Steps between inversions, or ``"auto"``.
        overhead: What a step may cost more with ``"auto"``, relative to the model's own passes.
        seed: Of the Monte-Carlo samples.
        other_curvature: ``"diagonal"``, or None, of the parameters without Kronecker structure.
        process_group: The processes that share each batch: ``"all"``, some, or None.

    Raises:
        ValueError: For a value out of its range.
    """

    approximation: ApproximationChoice
    fisher: Fisher
    mc_samples: Samples
    relative_damping: bool
    damping_split: Split
    factor_decay: float
    factor_interval: Interval
    inverse_interval: Interval
    overhead: float
    seed: int
    curvature: CurvatureChoice = "kfac"
    max_dim: int | None = 8192
    large_factors: LargeFactors = "auto"
    other_curvature: OtherCurvature | None = None
    process_group: ProcessGroup = "all"
    noise_damping: float | None = None

    def __post_init__(self) -> None:
        check_number("factor_decay", self.factor_decay, "in [0, 1)")
        check_number("overhead", self.overhead, "positive and finite")
        check_number("noise_damping", self.noise_damping, "in [0, inf)", None)
        check_whole("factor_interval", self.factor_interval, "auto")
        check_whole("inverse_interval", self.inverse_interval, "auto")
        check_whole("max_dim", self.max_dim, None)
        if not is_whole(self.seed):
            raise ValueError(f"seed is {self.seed!r}: it must be a whole number.")
        if not isinstance(self.relative_damping, bool):
            raise ValueError(f"relative_damping is {self.relative_damping!r}: True or False.")
        choices = {
            "damping_split": get_args(Split),
            "large_factors": get_args(LargeFactors),
            "other_curvature": (*get_args(OtherCurvature), None),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                names = " or ".join(map(repr, known))
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose {names}.")
        if self.other_curvature and self.fisher not in ("mc", "type-2"):
            raise ValueError(
                f"other_curvature={self.other_curvature!r} needs the extra backward passes of "
                f"fisher='mc' or 'type-2', but fisher is {self.fisher!r}."
            )
        if self.mc_samples != "auto" and self.fisher != "mc":
            raise ValueError(
                f"mc_samples={self.mc_samples!r} is for fisher='mc', but fisher is "
                f"{self.fisher!r}: leave it out."
            )

    def check(self, blocks: list[LayerBlock]) -> None:
        """Refuse layers whose curvature can't be had of this Fisher, or damped like this.

        Raises:
            ValueError: Naming them.
        """
        corrected = [block.name for block in blocks if block.curvature != "kfac"]
        if self.noise_damping and (self.damping_split != "pi" or len(corrected) == len(blocks) > 0):
            raise ValueError(
                f"noise_damping={self.noise_damping} is for layers with curvature='kfac' and "
                "damping_split='pi', and there are none: leave it out, or give 0."
            )
        if self.fisher == "forward-only" and corrected:
            raise ValueError(
                f"fisher='forward-only' has no gradients, but curvature is 'ekfac' or 'diagonal' "
                f"for layers {corrected}: use curvature='kfac' there, or another Fisher."
            )
