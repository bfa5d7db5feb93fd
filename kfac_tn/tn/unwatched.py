"""Whether an operator can be called that autograd and the likes of it know nothing of."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

PLAIN = (Tensor, Parameter)


def unwatched(*tensors: Tensor) -> bool:
    """Whether nobody differentiates, transforms, traces or counts what is done with plain tensors.

    What it asks are torch's own affairs, which other versions may arrange differently: whoever uses
    it tries it once, at import.

    Example:
        >>> unwatched(torch.ones(1)), unwatched(torch.ones(1, requires_grad=True))
        (True, False)
    """
    return (
        all(type(tensor) in PLAIN for tensor in tensors)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not torch._C._len_torch_dispatch_stack()
    )
