"""The likelihoods of torch's own losses."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from kfac_tn.likelihood.natural_parameters import (
    ElementwiseLikelihood,
    NaturalParameterLikelihood,
    each_element,
    require_same_shape,
)


class CrossEntropyLikelihood(NaturalParameterLikelihood):
    r"""The categorical likelihood of :class:`torch.nn.CrossEntropyLoss`.

    Outputs are logits ``[N, C]``, ``[N, C, d1, ...]`` or ``[C]``; targets class indices (the same
    shape without ``C``) or probabilities (the same shape). Every option counts: ``weight`` w,
    ``ignore_index``, ``label_smoothing`` ε, ``reduction``. With ``p = softmax(z)``, the Hessian at
    one position is ``c (diag(p) - p p^T)`` with

        c = (1 - ε) w_t + ε mean(w),    w_t = w_y (class index) or sum_k w_k q_k (probabilities q),

    0 if the target is ignored. ``"mean"`` divides by the sum of ``w_y`` over targets that aren't
    ignored, for probabilities by the number of positions.

    Positions (``d1, ...``) are independent terms, so each has exact columns of its own, zero
    elsewhere: else a model that mixes positions would bring in cross terms between them. That makes
    ``C - 1`` columns (the rank) per position; with many of either, a Monte-Carlo column, which
    costs one backward pass however many there are, is the cheap choice. So it is if positions were
    flattened into the first dimension (``[N * T, C]``): what happens to be one example for the loss
    is then not independent in the model, and only Monte-Carlo columns have no cross terms on
    average.

    If all targets are ignored, the mean loss is NaN, and so are the columns.

    Example:
        >>> loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
        >>> logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, -100])
        >>> likelihood = CrossEntropyLikelihood(loss)
        >>> root = torch.stack(list(likelihood.columns(logits, labels)))
        >>> root.shape  # two columns for three classes
        torch.Size([2, 4, 3])
        >>> p = logits.softmax(1)[0]
        >>> hessian = (p.diag() - p.outer(p)) / 3  # mean over the targets that count
        >>> torch.allclose(root[:, 0].T @ root[:, 0], hessian, atol=1e-6)
        True
        >>> int(likelihood.num_terms(logits, labels))
        3

    References:
        The root is ours: see the comment in :func:`_softmax_columns`. The usual one, ``C`` columns
        ``sqrt(p_v) (e_v - p)``, is in Dangel et al. (2020), appendix A.
    """

    @property
    def _label_smoothing(self) -> float:
        return self.loss.label_smoothing

    def _check(self) -> None:
        super()._check()
        self._check_weight("weight")
        if not 0 <= self._label_smoothing <= 1:
            raise ValueError(
                f"{self.loss} has label_smoothing={self._label_smoothing}: it must be in [0, 1]"
            )

    def _terms(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | int]:
        class_dim = _class_dim(outputs)
        num_classes = outputs.shape[class_dim]
        positions = outputs.shape[:class_dim] + outputs.shape[class_dim + 1 :]
        class_weight = (
            outputs.new_ones(num_classes)
            if self.loss.weight is None
            else self.loss.weight.to(outputs.dtype)
        )
        smoothing = self._label_smoothing
        if class_weight.shape != (num_classes,):
            raise ValueError(
                f"the loss has a weight of shape {tuple(class_weight.shape)}, but outputs of shape "
                f"{tuple(outputs.shape)} have {num_classes} classes: give one weight for each"
            )

        if targets.shape == outputs.shape and targets.is_floating_point():
            if self.loss.ignore_index >= 0:
                raise ValueError(
                    f"{self.loss} has ignore_index={self.loss.ignore_index}, which is for class "
                    f"indices, but the targets are probabilities: leave it out"
                )
            probabilities = targets.to(outputs.dtype).movedim(class_dim, -1)
            target_weight = (probabilities * class_weight).sum(-1)
            coefficient = (1 - smoothing) * target_weight + smoothing * class_weight.mean()
            return coefficient, target_weight.numel()

        if targets.shape != positions or targets.is_floating_point():
            raise ValueError(
                f"for outputs of shape {tuple(outputs.shape)}, targets must be class indices of "
                f"shape {tuple(positions)} or floating-point probabilities of the shape of the "
                f"outputs, but are of shape {tuple(targets.shape)} and {targets.dtype}"
            )
        labels = targets.long()
        counts = labels != self.loss.ignore_index
        # ignore_index may lie outside of the classes (-100, 255): look up any class instead.
        # (index_select: other negative labels are an error, as in the loss, not counted from the
        # end; and indexing with a scalar tensor would fetch it to the host.)
        try:
            looked_up = class_weight.index_select(0, labels.masked_fill(~counts, 0).flatten())
        except IndexError as error:
            raise IndexError(
                f"for outputs of shape {tuple(outputs.shape)}, targets must be in [0, "
                f"{num_classes}), or ignore_index={self.loss.ignore_index}, but are from "
                f"{int(labels[counts].min())} to {int(labels[counts].max())}"
            ) from error
        target_weight = looked_up.view(labels.shape) * counts
        coefficient = (1 - smoothing) * target_weight + smoothing * class_weight.mean() * counts
        return coefficient, target_weight.sum()

    def _columns(self, outputs: Tensor, scale: Tensor) -> Iterator[Tensor]:
        root_probabilities = outputs.softmax(_class_dim(outputs)).sqrt()
        return _softmax_columns(root_probabilities, scale)

    def _score(self, outputs: Tensor, generator: Generator | None) -> Tensor:
        class_dim = _class_dim(outputs)
        probabilities = outputs.softmax(class_dim)
        # Of independent exponential clocks with rates p, clock k rings first with probability p_k.
        # (torch.multinomial would synchronise with the host, to check the probabilities.)
        clocks = torch.empty_like(probabilities).exponential_(generator=generator)
        labels = (probabilities / clocks).argmax(class_dim, keepdim=True)
        return probabilities - torch.zeros_like(probabilities).scatter_(class_dim, labels, 1.0)

    def _scaled(self, score: Tensor, scale: Tensor) -> Tensor:
        return score * scale.unsqueeze(_class_dim(score))


class NLLLikelihood(CrossEntropyLikelihood):
    """The categorical likelihood of :class:`torch.nn.NLLLoss`.

    Outputs are log-probabilities, as ``log_softmax`` makes them, otherwise shaped as the logits of
    :class:`CrossEntropyLikelihood`; targets are class indices. The loss is linear in them, so its
    Hessian is 0; what is meant is the Fisher information, ``c (diag(p) - p p^T)`` with
    ``p = exp(outputs)``. Back-propagated through ``log_softmax``, which has Jacobian ``I - 1 p^T``,
    it is that of ``CrossEntropyLoss`` on the logits: ``p^T (I - 1 p^T) = 0``, so the last term
    adds nothing, and Monte-Carlo columns have mean 0. Outputs that aren't normalized are treated
    as if they were.

    Example:
        >>> outputs, labels = torch.randn(4, 3).log_softmax(1), torch.tensor([0, 2, 1, 0])
        >>> len(list(NLLLikelihood(torch.nn.NLLLoss()).columns(outputs, labels)))
        2
    """

    def normalized(self, outputs: Tensor) -> Tensor:
        """Log-probabilities as they are, but known to sum to 1 when the loss is differentiated.

        So the Hessian of the loss of these is the Fisher information.
        """
        return outputs.log_softmax(_class_dim(outputs))

    @property
    def _label_smoothing(self) -> float:
        return 0.0

    def _terms(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | int]:
        if targets.is_floating_point():
            raise ValueError(
                f"targets of NLLLoss must be class indices, but are {targets.dtype} of shape "
                f"{tuple(targets.shape)}; nn.CrossEntropyLoss takes probabilities"
            )
        return super()._terms(outputs, targets)


class MSELikelihood(ElementwiseLikelihood):
    """The Gaussian likelihood of :class:`torch.nn.MSELoss`.

    Outputs and targets ``[N, ...]``, of one shape. The Hessian is ``2 / M`` times the identity,
    ``M`` the number of elements for ``"mean"``, else 1. One exact column per output element of an
    example.

    Example:
        >>> likelihood = MSELikelihood(torch.nn.MSELoss())
        >>> for column in likelihood.columns(torch.zeros(2, 4), torch.ones(2, 4)):
        ...     print(column[0])
        tensor([0.5000, 0.0000, 0.0000, 0.0000])
        tensor([0.0000, 0.5000, 0.0000, 0.0000])
        tensor([0.0000, 0.0000, 0.5000, 0.0000])
        tensor([0.0000, 0.0000, 0.0000, 0.5000])

    References:
        Martens (2020), section 9.2; Dangel et al. (2020), appendix A.
    """

    def _terms(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | int]:
        require_same_shape(outputs, targets)
        # (z - y)^2 is twice the negative log-likelihood of a Gaussian of unit variance
        return torch.full_like(outputs, 2), outputs.numel()

    def _standard_deviation(self, outputs: Tensor) -> Tensor:
        return torch.ones_like(outputs)

    def _score(self, outputs: Tensor, generator: Generator | None) -> Tensor:
        return torch.empty_like(outputs).normal_(generator=generator)


class BCEWithLogitsLikelihood(ElementwiseLikelihood):
    """The Bernoulli likelihood of :class:`torch.nn.BCEWithLogitsLoss`.

    Outputs (logits) and targets (probabilities) ``[N, ...]``, of one shape, to which the loss's
    ``weight`` and ``pos_weight`` broadcast. The Hessian is diagonal, with entries
    ``weight * (1 - y + pos_weight * y) * sigmoid(z) * sigmoid(-z)``, for ``"mean"`` over the number
    of elements. One exact column per output element of an example.

    Example:
        >>> loss = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0))
        >>> targets = torch.tensor([[0.0], [1.0]])
        >>> (column,) = BCEWithLogitsLikelihood(loss).columns(torch.zeros(2, 1), targets)
        >>> (column**2).flatten()  # sigmoid(0) * sigmoid(-0) = 1 / 4
        tensor([0.1250, 0.3750])

    References:
        Martens (2020), section 9.2; Dangel et al. (2020), appendix A.
    """

    def _check(self) -> None:
        super()._check()
        self._check_weight("weight")
        self._check_weight("pos_weight")

    def _terms(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | int]:
        require_same_shape(outputs, targets)
        targets = targets.to(outputs.dtype)
        coefficient = torch.ones_like(outputs)
        if self.loss.pos_weight is not None:
            coefficient = 1 - targets + self.loss.pos_weight.to(outputs.dtype) * targets
        if self.loss.weight is not None:
            coefficient = coefficient * self.loss.weight.to(outputs.dtype)
        return coefficient, outputs.numel()

    def _standard_deviation(self, outputs: Tensor) -> Tensor:
        # not 1 - sigmoid(z): it cancels for large z
        return (outputs.sigmoid() * (-outputs).sigmoid()).sqrt()

    def _score(self, outputs: Tensor, generator: Generator | None) -> Tensor:
        probabilities = outputs.sigmoid()
        # torch.bernoulli raises (on CUDA, aborts) on NaN, which is for the caller to deal with
        uniform = torch.empty_like(outputs).uniform_(generator=generator)
        return probabilities - (uniform < probabilities).to(outputs.dtype)


class PoissonNLLLikelihood(ElementwiseLikelihood):
    """The Poisson likelihood of :class:`torch.nn.PoissonNLLLoss`, for counts.

    Outputs (logarithms of rates) and targets ``[N, ...]``, of one shape. The Hessian is diagonal,
    with entries ``exp(z)``, for ``"mean"`` over the number of elements; ``full`` adds a constant to
    the loss, ``eps`` has no effect with logarithms. One exact column per output element of an
    example.

    Raises:
        ValueError: With ``log_input=False``: rates aren't natural parameters.

    Example:
        >>> likelihood = PoissonNLLLikelihood(torch.nn.PoissonNLLLoss(reduction="sum"))
        >>> (column,) = likelihood.columns(torch.tensor([[0.0]]), torch.tensor([[3.0]]))
        >>> float(column**2)
        1.0

    References:
        McCullagh & Nelder (1989), Generalized linear models, section 6.2.
    """

    def _check(self) -> None:
        super()._check()
        if not self.loss.log_input:
            raise ValueError(
                f"{self.loss} takes rates, which aren't the natural parameters of the Poisson "
                "distribution, so its Hessian isn't the Fisher information: let the model predict "
                "their logarithms, and set log_input=True"
            )

    def _terms(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | int]:
        require_same_shape(outputs, targets)
        return torch.ones_like(outputs), outputs.numel()

    def _standard_deviation(self, outputs: Tensor) -> Tensor:
        return (outputs / 2).exp()

    def _score(self, outputs: Tensor, generator: Generator | None) -> Tensor:
        rates = outputs.exp()
        # torch.poisson refuses NaN; rates that aren't finite make scores that aren't
        return rates - torch.poisson(rates.nan_to_num(0.0, 0.0, 0.0), generator)


def _class_dim(outputs: Tensor) -> int:
    return 0 if outputs.ndim == 1 else 1


def _softmax_columns(root_probabilities: Tensor, scale: Tensor) -> Iterator[Tensor]:
    """Columns of a root of ``scale^2 (diag(p) - p p^T)`` at each position.

    Args:
        root_probabilities: ``sqrt(p)``, shaped like the outputs: ``[N, C, d1, ...]`` or ``[C]``.
        scale: Without the ``C``.
    """
    # With the unit vector s = sqrt(p), diag(p) - p p^T = diag(s) (I - s s^T) diag(s). An
    # orthonormal basis of the complement of s, the range of the projection in the middle, are all
    # columns but the first of the Householder reflection I - u u^T / (1 + s_0), u = s + e_0, which
    # takes s to -e_0. So C - 1 columns do; nothing is divided by less than 1; no probability is too
    # small.
    num_classes = root_probabilities.shape[_class_dim(root_probabilities)]
    for position in each_element(root_probabilities.shape[2:]):
        s = root_probabilities[position]  # [N, C] or [C]
        diagonal = s * scale[position].unsqueeze(-1)
        u = s.clone()
        u[..., 0] += 1
        for v in range(1, num_classes):
            basis_vector = -u * (s[..., v] / u[..., 0]).unsqueeze(-1)
            basis_vector[..., v] += 1
            column = torch.zeros_like(root_probabilities)
            column[position] = diagonal * basis_vector
            yield column
