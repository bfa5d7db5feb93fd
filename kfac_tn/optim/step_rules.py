"""How far to go along a curvature direction: interchangeable rules."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

StepRule: TypeAlias = Literal["graft", "kl_clip", "fixed"]


def graft(directions: list[Tensor], references: list[Tensor]) -> None:
    """Give each direction, in place, the Euclidean norm of its reference.

    The direction of one method with the step size of another (Agarwal et al. 2020, arXiv
    2002.11803), for each parameter. A direction that is zero stays so.

    Example:
        >>> import torch
        >>> direction = torch.tensor([3.0, 4.0])
        >>> graft([direction], [torch.tensor([0.0, 1.0])])
        >>> direction
        tensor([0.6000, 0.8000])
    """
    if not directions:
        return
    wanted = torch.stack(torch._foreach_norm(references))
    given = torch.stack(torch._foreach_norm(directions))
    scales = torch.where(given > 0, wanted / given, torch.zeros_like(given))
    torch._foreach_mul_(directions, list(scales.unbind()))


def clip_kl(
    directions: list[Tensor], gradients: list[Tensor], lrs: list[float], limit: float
) -> None:
    """Shrink all directions, in place, such that the step's quadratic KL estimate has a limit.

    With d = F^-1 g a step -lr d changes the model's distribution by about lr^2 d^T g (twice its KL
    divergence); one factor min(1, sqrt(limit / sum lr^2 d^T g)) for all keeps that below the limit
    (Ba, Grosse & Martens 2017, Section 5).

    Example:
        >>> import torch
        >>> direction = torch.tensor([2.0])
        >>> clip_kl([direction], [torch.tensor([2.0])], lrs=[1.0], limit=1.0)
        >>> direction
        tensor([1.])
    """
    if not directions:
        return
    products = torch._foreach_mul(directions, gradients)
    change = torch.stack(
        [lr**2 * product.sum() for lr, product in zip(lrs, products, strict=True)]
    ).sum()
    scale = torch.where(change > limit, (limit / change).sqrt(), torch.ones_like(change))
    torch._foreach_mul_(directions, scale)
