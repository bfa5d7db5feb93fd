"""Moving averages and inverses, batched by shape."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kfac_tn.curvature.moving import MovingFactors, invert
from kfac_tn.factors import Factors
from kfac_tn.layers import partition


def make_blocks(count: int = 3, dtype=torch.float64):
    model = nn.ModuleList([nn.Conv1d(4, 6, 2, groups=2, dtype=dtype) for _ in range(count)])
    return partition(model)[0]


def spd(*shape: int) -> torch.Tensor:
    root = torch.rand(*shape, shape[-1], dtype=torch.float64)
    return root @ root.mT


def random_factors(dtype=torch.float64) -> Factors:
    a, b = torch.rand(2, 5, 5, dtype=dtype), torch.rand(2, 3, 3, dtype=dtype)
    return Factors(a @ a.mT, b @ b.mT)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])
def test_averages_are_corrected_for_their_start(decay):
    torch.manual_seed(0)
    (block,) = make_blocks(1)
    moving = MovingFactors([block], decay)
    assert moving.factors(block) is None
    history = []
    for k in range(1, 6):
        history.append(random_factors())
        moving.update({block: history[-1]})
        weights = [(1 - decay) * decay ** (k - j) / (1 - decay**k) for j in range(1, k + 1)]
        assert sum(weights) == pytest.approx(1)
        for name in ("input", "grad_output"):
            expected = sum(w * getattr(f, name) for w, f in zip(weights, history, strict=True))
            torch.testing.assert_close(getattr(moving.factors(block), name), expected)


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("relative", [True, False])
def test_batched_layers_equal_single_ones_and_the_dense_inverse(relative, large, monkeypatch):
    torch.manual_seed(0)
    if large:  # whose products aren't made together
        monkeypatch.setattr("kfac_tn.curvature.moving.LEAST_PRODUCT", 0)
    blocks = make_blocks()
    together, alone = MovingFactors(blocks, 0.9), [MovingFactors([b], 0.9) for b in blocks]
    new = {block: random_factors() for block in blocks}
    together.update(new)
    assert invert([together], 0.01, relative) == []
    matrices = {block: torch.rand(2, 3, 5).double() for block in blocks}
    results = together.precondition(matrices)
    for block, single in zip(blocks, alone, strict=True):
        single.update({block: new[block]})
        assert invert([single], 0.01, relative) == []
        expected = single.precondition({block: matrices[block]})[block]
        torch.testing.assert_close(results[block], expected)
        # A part of the layers:
        part = together.precondition({block: matrices[block]})
        torch.testing.assert_close(part[block], expected)
        for g in range(2):
            a, b = new[block].input[g], new[block].grad_output[g]
            mean_a, mean_b = a.trace() / 5, b.trace() / 3
            pi = (mean_a / mean_b).sqrt()
            shift_a, shift_b = (0.1 * mean_a, 0.1 * mean_b) if relative else (0.1 * pi, 0.1 / pi)
            damped_a = a + shift_a * torch.eye(5).double()
            damped_b = b + shift_b * torch.eye(3).double()
            dense = damped_b.inverse() @ matrices[block][g] @ damped_a.inverse()
            torch.testing.assert_close(expected[g], dense, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("relative", [True, False])
def test_relative_damping_knows_no_scale(relative):
    torch.manual_seed(0)
    (block,) = make_blocks(1)
    factors, matrix = random_factors(), torch.rand(2, 3, 5).double()
    results = []
    for scale in (1.0, 1e-6):
        moving = MovingFactors([block], 0.9)
        moving.update({block: Factors(factors.input, scale * factors.grad_output)})
        invert([moving], 0.01, relative)
        results.append(scale * moving.precondition({block: matrix})[block])
    same = torch.allclose(*results, rtol=1e-6)
    assert same is relative


@pytest.mark.parametrize("relative", [True, False])
def test_layers_of_different_shapes_are_inverted_together_as_alone(relative):
    """Sizes 5 and 3 each occur in two shapes of block, once as the input's and once not."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 3), nn.Linear(2, 5), nn.Linear(4, 5), nn.Linear(6, 2)]
    blocks = partition(nn.ModuleList(layers).double())[0]
    together = [MovingFactors([block], 0.9) for block in blocks]
    alone = [MovingFactors([block], 0.9) for block in blocks]
    for moving in (*together, *alone[:-1]):
        (block,) = moving.blocks
        a, b = spd(1, block.input_dim + 1), spd(1, block.grad_output_dim)
        moving.update({block: Factors(a, b)})
    for one, other in zip(together, alone, strict=True):
        if any(other.updates):
            other.input, other.grad_output = one.input.clone(), one.grad_output.clone()
    together[-1] = alone[-1]  # without factors
    assert invert(together, 0.1, relative) == []
    for one, other in zip(together[:-1], alone[:-1], strict=True):
        assert one.lacks_inverse is False
        assert other.lacks_inverse is True
        assert invert([other], 0.1, relative) == []
        torch.testing.assert_close(one.input_inverse, other.input_inverse)
        torch.testing.assert_close(one.grad_output_inverse, other.grad_output_inverse)


def test_layers_without_factors_are_left_out():
    torch.manual_seed(0)
    first, second, third = make_blocks()
    moving = MovingFactors([first, second, third], 0.9)
    assert invert([moving], 0.1, True) == []
    matrices = {block: torch.ones(2, 3, 5).double() for block in (first, second, third)}
    assert moving.precondition(matrices) == {}
    moving.update({second: random_factors()})
    assert moving.precondition(matrices) == {}  # averaged, but not inverted yet
    invert([moving], 0.1, True)
    assert list(moving.precondition(matrices)) == [second]
    assert [moving.factors(block) is None for block in moving.blocks] == [True, False, True]


@pytest.mark.parametrize("relative", [True, False])
def test_a_layer_that_cannot_be_inverted_keeps_its_last_good_inverse(relative):
    torch.manual_seed(0)
    blocks = make_blocks(2)
    moving = MovingFactors(blocks, 0.0)
    moving.update({block: random_factors() for block in blocks})
    invert([moving], 0.1, relative)
    matrices = {block: torch.ones(2, 3, 5).double() for block in blocks}
    before = moving.precondition(matrices)
    bad = random_factors()
    bad.grad_output[1] -= 100 * torch.eye(3)
    moving.update({blocks[0]: bad, blocks[1]: random_factors()})
    assert invert([moving], 0.1, relative) == [blocks[0].name]
    after = moving.precondition(matrices)
    assert torch.equal(before[blocks[0]], after[blocks[0]])
    assert not torch.equal(before[blocks[1]], after[blocks[1]])


@pytest.mark.parametrize("relative", [True, False])
def test_zero_factors_can_be_inverted(relative):
    (block,) = make_blocks(1)
    moving = MovingFactors([block], 0.0)
    moving.update({block: Factors(torch.zeros(2, 5, 5).double(), torch.zeros(2, 3, 3).double())})
    assert invert([moving], 0.01, relative) == []
    assert moving.precondition({block: torch.ones(2, 3, 5).double()})[block].isfinite().all()


def test_state_goes_around_and_another_models_is_refused_whole():
    torch.manual_seed(0)
    blocks = make_blocks()
    moving = MovingFactors(blocks, 0.9)
    moving.update({blocks[0]: random_factors(), blocks[2]: random_factors()})
    invert([moving], 0.1, True)
    state = moving.state_dict()
    assert set(state) == {"0", "2"}
    fresh = MovingFactors(blocks, 0.9)
    fresh.load_state_dict(state)
    matrices = {block: torch.rand(2, 3, 5).double() for block in blocks}
    for _ in range(2):
        expected, actual = moving.precondition(matrices), fresh.precondition(matrices)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(actual[block], expected[block]) for block in expected)
        new = {block: random_factors() for block in blocks}
        for each in (moving, fresh):
            each.update(new)
            invert([each], 0.1, True)
    for name, shape in (("input", (2, 4, 4)), ("grad_output", (2, 2, 2)), ("input", (1, 5, 5))):
        broken = {layer: dict(entry) for layer, entry in state.items()}
        broken["2"][name] = torch.zeros(shape)
        before = fresh.precondition(matrices)
        with pytest.raises(ValueError, match="layer '2'"):
            fresh.load_state_dict(broken)
        after = fresh.precondition(matrices)
        assert all(torch.equal(after[block], before[block]) for block in before)


def test_the_state_is_a_copy():
    torch.manual_seed(0)
    (block,) = make_blocks(1)
    moving = MovingFactors([block], 0.9)
    moving.update({block: random_factors()})
    kept = moving.state_dict()[block.name]["input"]
    before = kept.clone()
    moving.update({block: random_factors()})
    assert torch.equal(kept, before)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("size", [8, 128])
def test_directions_are_contiguous_columns_of_the_dense_product(size, layers):
    torch.manual_seed(0)
    blocks = partition(nn.ModuleList([nn.Linear(size - 1, size) for _ in range(layers)]))[0]
    moving = MovingFactors(blocks, 0.9)
    roots = [torch.rand(2, size, size) / size for _ in blocks]
    moving.update(
        {b: Factors(*(r @ r.mT).unsqueeze(1)) for b, r in zip(blocks, roots, strict=True)}
    )
    assert invert([moving], 0.1, True) == []
    columns = {b: (torch.rand(1, size, size - 1), torch.rand(1, size, 1)) for b in blocks}
    results = moving.directions(columns)
    for slot, block in enumerate(blocks):
        b, a = (each[slot].double() for each in (moving.grad_output_inverse, moving.input_inverse))
        expected = b @ torch.cat(columns[block], -1).double() @ a
        assert all(part.is_contiguous() for part in results[block])
        actual = torch.cat(results[block], -1).double()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.8])
def test_noisy_factors_are_damped_more(decay, relative):
    """By sqrt(1 + noise (d / N)^2) each, with N the vectors in an average, faded as it fades."""
    torch.manual_seed(0)
    (block,) = make_blocks(1)
    moving, plain, seen = MovingFactors([block], decay), MovingFactors([block], decay), 0.0
    moving.noise = 10.0
    for vectors in (4, 7, 3):
        factors = random_factors()
        for each in (moving, plain):
            each.update({block: factors})
        moving.count(block, vectors, 2.0)
        seen = decay * seen + vectors
    shares = [(1 + 10 * (d / n) ** 2) ** 0.5 for d, n in ((5, seen), (3, 2 * seen))]
    pairs = zip(moving.shifts(0.01, relative), plain.shifts(0.01, relative), shares, strict=True)
    for shift, without, share in pairs:
        torch.testing.assert_close(shift, share * without)
    whole = shares[0] * shares[1] * plain.damping(block, 0.01, relative)
    torch.testing.assert_close(moving.damping(block, 0.01, relative), whole)
    assert moving.state_dict()[block.name]["inputs"] == pytest.approx(seen)
    moving.forget(block)
    moving.update({block: random_factors()})
    assert moving.inputs == moving.grad_outputs == [0.0]
