"""The linear layers of recurrent networks: of inputs, of hidden states, and their projections.

Their factors are those of KFAC-expand or KFAC-reduce, with time for the axis that is shared. Expand
takes what a weight contributes at different times for uncorrelated and equally distributed, as the
simplest of the three approximations of Martens, Ba & Johnson 2018 (Kronecker-factored Curvature
Approximations for Recurrent Neural Networks) does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import GRU, LSTM, RNN, GRUCell, LSTMCell, Module, RNNCell

from kfac_tn.layers.hidden import HiddenCall, HiddenLayers, HiddenLinear

State: TypeAlias = tuple[Tensor, ...]
"""The hidden state ``[N, d]`` that is fed back, and an LSTM's cell state."""
Update: TypeAlias = Callable[[Tensor, Tensor, State], State]
"""From what the layers of inputs and of hidden states return, and the state, to the next state."""

_KINDS = (LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell)
_WEIGHT = re.compile(r"weight_((?:ih|hh|hr)(?:_l\d+(?:_reverse)?)?)")


def recurrent_layers(module: Module) -> dict[str, HiddenLinear]:
    """The linear layers of torch's recurrent modules and cells, by name; of any other module none.

    Of ``weight_ih_l0`` and ``bias_ih_l0``, ``"ih_l0"``, and so on.

    Example:
        >>> list(recurrent_layers(torch.nn.LSTM(4, 3, proj_size=2))), list(
        ...     recurrent_layers(torch.nn.GRUCell(4, 3)))
        (['ih_l0', 'hh_l0', 'hr_l0'], ['ih', 'hh'])
    """
    if type(module) not in _KINDS:
        return {}
    names = [name for name, weight in module._parameters.items() if weight is not None]
    found = [match for name in names if (match := _WEIGHT.fullmatch(name))]
    return {each[1]: HiddenLinear(module, each[0], f"bias_{each[1]}") for each in found}


# ---- what the modules compute ------------------------------------------------------------------


def _lstm(x: Tensor, h: Tensor, state: State) -> State:
    i, f, g, o = (x + h).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x: Tensor, h: Tensor, state: State) -> State:
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), h.chunk(3, -1)
    new = (xn + (xr + hr).sigmoid() * hn).tanh()
    return (new + (xz + hz).sigmoid() * (state[0] - new),)


def _tanh(x: Tensor, h: Tensor, state: State) -> State:
    return ((x + h).tanh(),)


def _relu(x: Tensor, h: Tensor, state: State) -> State:
    return ((x + h).relu(),)


def _cell(
    update: Update,
    layers: HiddenLayers,
    x: Tensor,
    state: Tensor | State,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> Tensor | State:
    """``torch.lstm_cell`` and the like."""
    state = (state,) if isinstance(state, Tensor) else tuple(state)
    if len(x) != len(state[0]):
        raise RuntimeError(f"Input has {len(x)} rows, but the hidden state {len(state[0])}.")
    from_x = layers.apply(x, weight_ih, bias_ih)
    new = update(from_x, layers.apply(state[0], weight_hh, bias_hh), state)
    return new if len(new) > 1 else new[0]


def _network(update: Update, layers: HiddenLayers, *args: Any) -> State:
    """``torch.lstm`` and the like, of sequences of one length or packed ones."""
    x, *rest = args
    packed = not isinstance(args[3], bool)  # then sizes stand before all that they share
    times = Times([int(size) for size in rest.pop(0)] if packed else None)
    initial, weights, biases, num_layers, dropout, training, bidirectional, *batch_first = rest
    if not packed and not batch_first[0]:
        x = x.transpose(0, 1)
    initial = (initial,) if isinstance(initial, Tensor) else initial
    states = zip(*(each.unbind(0) for each in initial), strict=True)
    per_layer = len(weights) // (num_layers * (1 + bidirectional))
    groups = (weights[start : start + per_layer] for start in range(0, len(weights), per_layer))
    ends: list[State] = []
    for layer in range(num_layers):
        if layer > 0 and training and dropout:
            x = _drop(x, dropout)
        outputs = []
        for reverse in (False, True)[: 1 + bidirectional]:
            direction = Direction(layers, times, update, Weights.of(next(groups), biases))
            output, end = direction(x, next(states), reverse)
            outputs.append(output)
            ends.append(end)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
    if not packed and not batch_first[0]:
        x = x.transpose(0, 1).contiguous()  # as users may rely on
    return x, *(torch.stack(each) for each in zip(*ends, strict=True))


def _drop(x: Tensor, dropout: float) -> Tensor:
    """Dropout with the random numbers of torch's kernels on CPUs, which have times in front."""
    if x.dim() == 2:
        return torch.dropout(x, dropout, True)
    return torch.dropout(x.transpose(0, 1).contiguous(), dropout, True).transpose(0, 1)


@dataclass(frozen=True)
class Times:
    """How rows of all times lie: ``[N, T, d]``, or of sequences of several lengths ``[S, d]``.

    Attributes:
        sizes: Of packed ones: how many sequences are as long as each time. S is their sum.
    """

    sizes: list[int] | None

    @property
    def packed(self) -> bool:
        """Whether sequences have several lengths."""
        return self.sizes is not None

    def split(self, rows: Tensor) -> Sequence[Tensor]:
        """The rows of each time, ``[n, d]``."""
        return rows.unbind(1) if self.sizes is None else rows.split(self.sizes)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The rows of all times."""
        return torch.stack(list(parts), 1) if self.sizes is None else torch.cat(list(parts))


@dataclass(frozen=True)
class Weights:
    """Those of one layer in one direction."""

    ih: Tensor
    hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    hr: Tensor | None

    @classmethod
    def of(cls, weights: Sequence[Tensor], biases: bool) -> Weights:
        """From the order in which torch has them."""
        ih, hh, *rest = weights
        bias_ih, bias_hh = (rest.pop(0), rest.pop(0)) if biases else (None, None)
        return cls(ih, hh, bias_ih, bias_hh, rest[0] if rest else None)


@dataclass(frozen=True)
class Direction:
    """One layer of a recurrent network, from the first time to the last or back."""

    layers: HiddenLayers
    times: Times
    update: Update
    weights: Weights

    def __call__(self, x: Tensor, state: State, reverse: bool) -> tuple[Tensor, State]:
        """The hidden states of all times, and the last state."""
        layers, times, own = self.layers, self.times, self.weights
        from_x = times.split(layers.apply(x, own.ih, own.bias_ih, times.packed))
        hidden = InTurn(layers, times, own.hh, own.bias_hh, x.shape[:-1])
        projection = None if own.hr is None else InTurn(layers, times, own.hr, None, x.shape[:-1])
        outputs: dict[int, Tensor] = {}
        steps = range(len(from_x))
        for step in reversed(steps) if reverse else steps:
            before = _first(len(from_x[step]), state)
            h, *cell = self.update(from_x[step], hidden(before[0], step), before)
            outputs[step] = h = h if projection is None else projection(h, step)
            state = _replaced(state, (h, *cell))
        for each in (hidden, projection):
            if each is not None:
                each.record()
        return times.join([outputs[step] for step in steps]), state


def _first(count: int, state: State) -> State:
    """That of so many sequences, which are the longest."""
    return state if len(state[0]) == count else tuple(each[:count] for each in state)


def _replaced(state: State, new: State) -> State:
    """With a new one of the first. Others have come to their end, or, backwards, wait to begin."""
    count = len(new[0])
    if len(state[0]) == count:
        return new
    return tuple(torch.cat([a, b[count:]]) for a, b in zip(new, state, strict=True))


class InTurn:
    """A linear layer that is applied at one time after the other, which is recorded as one call.

    Its outputs are products and a bias that is expanded to all times (of zeros, if it has none): at
    the node that expands it, the gradients of all outputs arrive together.

    Args:
        layers: Where to record it.
        times: How inputs and outputs of all times lie.
        weight: The layer's weight.
        bias: Its bias.
        rows: The shape of all inputs, without their last axis.
    """

    def __init__(
        self,
        layers: HiddenLayers,
        times: Times,
        weight: Tensor,
        bias: Tensor | None,
        rows: torch.Size,
    ) -> None:
        self._layers, self._times = layers, times
        self._layer = layers.get(weight)
        self._weight = weight.t()
        bias = weight.new_zeros(()) if bias is None else bias
        if self._layer is not None and not bias.requires_grad:
            bias = bias.detach().requires_grad_()
        self._biases = bias.expand(*rows, len(weight))
        self._bias_at = times.split(self._biases)
        self._inputs: dict[int, Tensor] = {}

    def __call__(self, x: Tensor, step: int) -> Tensor:
        """Apply it to what it gets at one time, ``[n, d]``."""
        if self._layer is not None:
            self._inputs[step] = x.detach()
        return torch.addmm(self._bias_at[step], x, self._weight)

    def record(self) -> None:
        """Record what was applied."""
        if self._layer is None:
            return
        x = self._times.join([self._inputs[step] for step in range(len(self._inputs))])
        within = self._weight.grad_fn
        self._layers.record(HiddenCall(self._layer, x, self._biases, within, self._times.packed))


COMPUTED: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.lstm: partial(_network, _lstm),
    torch.gru: partial(_network, _gru),
    torch.rnn_tanh: partial(_network, _tanh),
    torch.rnn_relu: partial(_network, _relu),
    torch.lstm_cell: partial(_cell, _lstm),
    torch.gru_cell: partial(_cell, _gru),
    torch.rnn_tanh_cell: partial(_cell, _tanh),
    torch.rnn_relu_cell: partial(_cell, _relu),
}
"""torch's functions for recurrent modules, with linear layers that are applied apart."""
