"""What can be chosen about curvature that follows a training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from kfac_tn.capture import Fisher
from kfac_tn.columns import Samples
from kfac_tn.curvature.intervals import Interval
from kfac_tn.distributed import ProcessGroup
from kfac_tn.layers import ApproximationChoice, CurvatureChoice, LargeFactors, LayerBlock

Split: TypeAlias = Literal["pi", "exact"]
OtherCurvature: TypeAlias = Literal["diagonal"]

NOISE = 10.0
"""By how much noisy factors are damped more, where nobody says otherwise."""


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
        if not 0 <= self.factor_decay < 1:
            raise ValueError(f"factor_decay is {self.factor_decay}: it must be in [0, 1).")
        for name in ("factor_interval", "inverse_interval"):
            interval = getattr(self, name)
            if interval == "auto":
                continue
            if isinstance(interval, str) or interval < 1 or interval != int(interval):
                raise ValueError(
                    f"{name} is {interval!r}: it must be a positive whole number, or 'auto'."
                )
        if self.damping_split not in get_args(Split):
            raise ValueError(
                f"damping_split is {self.damping_split!r}: choose one of {get_args(Split)}."
            )
        limit = self.max_dim
        if limit is not None and (isinstance(limit, str) or limit < 1 or limit != int(limit)):
            raise ValueError(f"max_dim is {limit!r}: it must be a positive whole number, or None.")
        if self.large_factors not in get_args(LargeFactors):
            raise ValueError(
                f"large_factors is {self.large_factors!r}: choose one of {get_args(LargeFactors)}."
            )
        if self.other_curvature not in (None, *get_args(OtherCurvature)):
            raise ValueError(
                f"other_curvature is {self.other_curvature!r}: choose 'diagonal' or None."
            )
        if self.other_curvature and self.fisher not in ("mc", "type-2"):
            raise ValueError(
                f"other_curvature={self.other_curvature!r} needs the extra backward passes of "
                f"fisher='mc' or 'type-2', but fisher is {self.fisher!r}."
            )
        if not 0 < self.overhead < float("inf"):
            raise ValueError(f"overhead is {self.overhead}: it must be positive.")
        noise = self.noise_damping
        if noise is not None and (isinstance(noise, str) or not 0 <= noise < float("inf")):
            raise ValueError(f"noise_damping is {noise!r}: it must be in [0, inf), or None.")
        if not isinstance(self.relative_damping, bool):
            raise ValueError(f"relative_damping is {self.relative_damping!r}: True or False.")
        if isinstance(self.seed, str) or self.seed != int(self.seed):
            raise ValueError(f"seed is {self.seed!r}: it must be a whole number.")

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
