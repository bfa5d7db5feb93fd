"""Patterns as steps, and evaluation within a limit of memory."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_tn import tn
from kfac_tn.tn import IndexPattern
from kfac_tn.tn import plan as planning
from kfac_tn.tn.pattern import PADDING_MODES
from kfac_tn.tn.pieces import _division
from kfac_tn.tn.steps import Expand, Fold, Product, Scatter

torch.set_num_threads(1)
SPEC = tn.ConvSpec((2, 4, 5, 6), (6, 2, 3, 2), (1, 2), padding=1, groups=2)
VJP = tn.input_vjp(SPEC).simplify()
LARGE = tn.ConvSpec((4, 32, 28, 28), (32, 32, 3, 3), padding=1)
CPU = torch.device("cpu")


def operands_of(network, dtype=torch.float64):
    return {name: torch.rand(shape, dtype=dtype) for name, shape in network.operands.items()}


def steps(network, algorithm="unfolding"):
    recipe = network.plan(algorithm)
    return Counter(type(instruction.step) for instruction in recipe.instructions)


@st.composite
def patterns(draw):
    size = draw(st.integers(2, 7))
    return IndexPattern(
        draw(st.integers(1, 4)),
        draw(st.integers(1, 4)),
        size,
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.integers(0, size - 1)),
        draw(st.sampled_from(PADDING_MODES)),
    )


@settings(max_examples=60, deadline=None)
@given(pattern=patterns(), kept=st.sampled_from(["ko", "i", "ki", "oi"]))
def test_patterns_as_steps(pattern, kept):
    """A pattern with whatever of its indices is contracted, as a step and as a dense product."""
    given_ = [index for index in "koi" if index not in kept]
    nodes = [
        tn.Node(pattern, (("k",), ("o",), ("i",))),
        tn.Node(tn.Operand("x"), (("n",), *((index,) for index in given_))),
    ]
    sizes = dict(zip("koi", pattern.shape, strict=True)) | {"n": 2}
    network = tn.Network.build(nodes, [("n",), *((index,) for index in kept)], sizes)
    x = torch.rand(network.operands["x"], dtype=torch.float64)
    dense = pattern.tensor(torch.float64)
    expected = torch.einsum(f"koi,n{''.join(given_)}->n{kept}", dense, x)
    for algorithm in tn.ALGORITHMS:
        planner = planning.draft(network, algorithm)
        if planner is None:
            continue
        slots = {slot: x for slot, _, _ in planner.operands}
        for slot, constant in planner.constants.items():
            slots[slot] = planning._tensor(constant, torch.float64, CPU)
        for instruction in planner.instructions:
            slots[instruction.slot] = instruction.step(*[slots[i] for i in instruction.inputs])
        torch.testing.assert_close(slots[planner.result], expected, rtol=1e-13, atol=1e-13)


def test_transposed_direction_is_folded():
    """No dense pattern: two slices and more are added up; one kernel position is just put."""
    assert steps(tn.input_vjp(LARGE))[Fold] == 2
    assert not recipe_constants(tn.input_vjp(LARGE))
    pointwise = tn.ConvSpec((4, 32, 28, 28), (32, 32, 1, 1), stride=2)
    assert steps(tn.input_vjp(pointwise).simplify())[Scatter] == 2


def recipe_constants(network):
    return network.plan("unfolding").constants


def test_fold_is_the_adjoint_of_windows_and_differentiable():
    operands = operands_of(VJP)
    function = lambda *tensors: VJP.evaluate(**dict(zip(operands, tensors, strict=True)))  # noqa: E731
    tensors = tuple(t.requires_grad_() for t in operands.values())
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)
    fold = Fold(1, 2, 2, 1, 1, 9)
    x = torch.rand(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fold, (x,))
    assert torch.autograd.gradcheck(Scatter(2, 1, 2, 9), (x,))


def test_forward_copies_along_the_grain():
    """One product for each example: nothing is permuted after it."""
    instructions = tn.forward(LARGE).simplify().plan("unfolding").instructions
    assert isinstance(instructions[-1].step, Product)
    assert Expand in {type(instruction.step) for instruction in instructions}


@pytest.mark.parametrize(
    "builder",
    [tn.forward, tn.weight_vjp, tn.kfac_expand_input_factor, tn.input_vjp, tn.ggn_diagonal],
)
def test_memory_limit(builder):
    network = builder(tn.ConvSpec((6, 4, 9, 9), (8, 2, 3, 3), padding=1, groups=2)).simplify()
    operands = operands_of(network)
    expected = network.evaluate(**operands)
    for share in (1.0, 0.9, 0.7):
        limit = int(network.peak_memory * share)
        assert _division(network, limit)[0] == (None if share == 1 else "n")
        torch.testing.assert_close(network.evaluate(memory_limit=limit, **operands), expected)
    with pytest.raises(ValueError, match=r"memory_limit=3 elements is too little.* takes \d"):
        network.evaluate(memory_limit=3, **operands)


def test_memory_limit_and_the_environment(monkeypatch):
    """The algorithm that the environment names is taken for pieces, too, where it applies."""
    network = tn.forward(tn.ConvSpec((6, 4, 9, 9), (8, 4, 3, 3), padding=1)).simplify()
    operands = operands_of(network)
    expected = network.evaluate(**operands)
    limit = int(network.peak_memory * 0.9)
    seen = []
    monkeypatch.setattr(
        tn.Network,
        "evaluate",
        lambda self, _f=tn.Network.evaluate, **given: (
            seen.append(given.get("algorithm")) or _f(self, **given)
        ),
    )
    for name, taken in (
        ("tensors", {"tensors"}),
        ("cells", {"unfolding"}),
        ("", {"unfolding"}),
    ):
        monkeypatch.setenv("KFAC_TN_ALGORITHM", name)
        seen.clear()
        result = network.evaluate(memory_limit=limit, **operands)
        torch.testing.assert_close(result, expected)
        assert len(seen) > 2
        assert set(seen[1:]) == taken  # the first is the whole
    monkeypatch.setenv("KFAC_TN_ALGORITHM", "unheard-of")
    with pytest.raises(ValueError, match="unheard-of"):
        network.evaluate(memory_limit=limit, **operands)


def test_transposed_convolution_has_no_dense_pattern():
    """Its forward folds; its factor spreads, padding with the zeros that a stride leaves."""
    spec = tn.ConvSpec((4, 16, 14, 14), (16, 16, 4, 4), 2, 1, transposed=True)
    assert steps(tn.forward(spec))[Fold] == 2
    assert not recipe_constants(tn.unfold_input(spec))


def test_pieces_divide_an_operand_alike_wherever_it_occurs():
    sizes = {"i": 8, "j": 8, "k": 8}
    square = [
        tn.Node(tn.Operand("a"), (("i",), ("j",))),
        tn.Node(tn.Operand("a"), (("j",), ("k",))),
    ]
    network = tn.Network.build(square, [("i",), ("k",)], sizes)
    with pytest.raises(ValueError, match="memory_limit=10"):
        network.evaluate(memory_limit=10, a=torch.rand(8, 8))
    gram = [tn.Node(tn.Operand("a"), (("n",), ("i",))), tn.Node(tn.Operand("a"), (("n",), ("k",)))]
    network = tn.Network.build(gram, [("i",), ("k",)], {"n": 100, "i": 2, "k": 2})
    a = torch.rand(100, 2, dtype=torch.float64)
    assert _division(network, 300)[0] in (None, "n")
    torch.testing.assert_close(network.evaluate(memory_limit=30, a=a), a.T @ a)
