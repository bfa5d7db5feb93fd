"""From the user's loss to its likelihood."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

from torch import nn
from torch.nn import functional as F

from kfac_tn.likelihood.natural_parameters import check_reduction
from kfac_tn.likelihood.protocol import Likelihood
from kfac_tn.likelihood.torch_losses import (
    BCEWithLogitsLikelihood,
    CrossEntropyLikelihood,
    MSELikelihood,
    NLLLikelihood,
    PoissonNLLLikelihood,
)

_FACTORIES: dict[type, Callable[[Any], Likelihood]] = {
    nn.BCEWithLogitsLoss: BCEWithLogitsLikelihood,
    nn.CrossEntropyLoss: CrossEntropyLikelihood,
    nn.MSELoss: MSELikelihood,
    nn.NLLLoss: NLLLikelihood,
    nn.PoissonNLLLoss: PoissonNLLLikelihood,
}

_METHODS = ("columns", "sample", "num_terms")

_NO_CURVATURE = (
    "It has no curvature where it is linear, and isn't the negative log-likelihood of a smooth "
    "family; nn.MSELoss() is its neighbour that has"
)
_REMEDIES: dict[object, str] = {
    nn.BCELoss: "nn.BCELoss on sigmoid(z) is nn.BCEWithLogitsLoss on the logits z",
    nn.KLDivLoss: (
        "nn.KLDivLoss on log_softmax(z) is, up to a constant, nn.CrossEntropyLoss on the logits z "
        "with probabilities as targets (reduction='mean' for 'batchmean' on [N, C])"
    ),
    nn.L1Loss: _NO_CURVATURE,
    nn.SmoothL1Loss: _NO_CURVATURE,
    nn.HuberLoss: _NO_CURVATURE,
    nn.GaussianNLLLoss: "examples/custom_likelihood.py has a Gaussian with predicted variance",
    F.cross_entropy: "nn.CrossEntropyLoss(...)",
    F.nll_loss: "nn.NLLLoss(...)",
    F.poisson_nll_loss: "nn.PoissonNLLLoss(...)",
    F.mse_loss: "nn.MSELoss(...)",
    F.binary_cross_entropy: "nn.BCEWithLogitsLoss(...) on the logits",
    F.binary_cross_entropy_with_logits: "nn.BCEWithLogitsLoss(...)",
}


def likelihood_of(loss_fn: object) -> Likelihood:
    """The likelihood of a loss.

    A loss that has the members of :class:`~kfac_tn.likelihood.Likelihood` is its own likelihood.
    Others are looked up by their exact type: a subclass may compute something else.

    Args:
        loss_fn: The user's loss module. Its hyper-parameters are read whenever the likelihood is
            used, not now.

    Returns:
        Its likelihood.

    Raises:
        TypeError: The loss isn't known. The message says what would be.
        ValueError: It has an option that can't be honoured: a reduction that torch doesn't have, a
            negative weight, ``PoissonNLLLoss(log_input=False)``.

    Example:
        >>> likelihood_of(nn.MSELoss())
        MSELikelihood(MSELoss())
        >>> likelihood_of(nn.BCELoss())  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        TypeError: no likelihood is known for BCELoss(). nn.BCELoss on sigmoid(z) is ...
    """
    if not isinstance(loss_fn, type):
        missing = _missing_members(loss_fn)
        if not missing:
            check_reduction(loss_fn)
            return cast(Likelihood, loss_fn)
        factory = _FACTORIES.get(type(loss_fn))
        if factory is not None:
            return _made_by(factory, loss_fn)
    raise TypeError(
        f"no likelihood is known for {loss_fn!r}. {_remedy(loss_fn)}. Known are "
        f"{', '.join(sorted(map(_name, _FACTORIES)))}, and any loss with the members of "
        f"kfac_tn.likelihood.Likelihood (reduction, columns, sample, num_terms; a worked example "
        f"is examples/custom_likelihood.py). kfac_tn.likelihood.register_likelihood teaches the "
        f"package a loss class that can't have them."
    )


def register_likelihood(loss_class: type, factory: Callable[[Any], Likelihood]) -> None:
    """Make :func:`likelihood_of` know the losses of a class (of exactly that class).

    Meant for a loss that can't be changed, or for a subclass of a known loss whose values are the
    same (then the known loss's likelihood is the factory). One's own loss can implement the
    protocol.

    Args:
        loss_class: The class of the loss. A class registered before is replaced.
        factory: Called with a loss of that class, returns its
            :class:`~kfac_tn.likelihood.Likelihood`.

    Raises:
        TypeError: ``loss_class`` isn't a class, or ``factory`` can't be called.

    Example:
        >>> class LoggedLoss(nn.MSELoss):
        ...     pass
        >>> register_likelihood(LoggedLoss, MSELikelihood)
        >>> likelihood_of(LoggedLoss())
        MSELikelihood(LoggedLoss())
    """
    if not isinstance(loss_class, type):
        raise TypeError(f"loss_class must be a class, not {loss_class!r}")
    if not callable(factory):
        raise TypeError(f"factory must be callable, not {factory!r}")
    _FACTORIES[loss_class] = factory


def _missing_members(candidate: object) -> list[str]:
    return [name for name in ("reduction", *_METHODS) if not hasattr(candidate, name)]


def _made_by(factory: Callable[[Any], Likelihood], loss_fn: object) -> Likelihood:
    likelihood = factory(loss_fn)
    if missing := _missing_members(likelihood):
        raise TypeError(
            f"the factory registered for {_name(type(loss_fn))} returned {likelihood!r}, which has "
            f"no {', '.join(missing)}: see kfac_tn.likelihood.Likelihood"
        )
    check_reduction(likelihood)
    return likelihood


def _name(cls: type) -> str:
    # torch.nn.MSELoss rather than torch.nn.modules.loss.MSELoss
    public = getattr(nn, cls.__name__, None) is cls
    return f"torch.nn.{cls.__name__}" if public else f"{cls.__module__}.{cls.__qualname__}"


def _remedy(loss_fn: object) -> str:
    """What the owner of an unknown loss most likely wants to do."""
    if isinstance(loss_fn, type):
        return "It is a class: pass a loss, an instance of it"
    if inspect.isroutine(loss_fn):
        module = _REMEDIES.get(loss_fn, "the nn.Module of the same loss")
        return (
            f"It is a function, which can't be observed when called: pass {module}, and either "
            f"compute the loss with it or call optimizer.observe(outputs, targets) before "
            f"loss.backward()"
        )
    if isinstance(getattr(loss_fn, "_orig_mod", None), nn.Module):
        return (
            "It was made by torch.compile, which hides what it is: pass the loss module that was "
            "compiled (loss_fn._orig_mod); the compiled one may be called all the same"
        )
    missing = _missing_members(loss_fn)
    if any(name not in missing for name in _METHODS):
        return f"It seems meant to be a likelihood, but has no {', '.join(missing)}"
    for known, factory in _FACTORIES.items():
        if isinstance(loss_fn, known):
            return (
                f"It is a subclass of {_name(known)}, but may compute something else. If it "
                f"doesn't, say so: register_likelihood({type(loss_fn).__name__}, "
                f"{getattr(factory, '__name__', repr(factory))})"
            )
    return _REMEDIES.get(type(loss_fn), "It doesn't say what its likelihood is")
