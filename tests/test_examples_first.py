"""Models that have the examples elsewhere than on the first axis are found out, and no others."""

import pytest
import torch
from torch import nn

import kfac_tn
from kfac_tn.layers.linear import LinearFamily
from kfac_tn.testing import dense_ggn, relative_error

N, T = 4, 5


class Sequences(nn.Module):
    """Logits of all positions, `[N T, C]` or `[N, C, T]`, that may depend on other positions."""

    def __init__(self, flat, mix=None):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)
        self.flat, self.mix = flat, mix

    def forward(self, x):
        h = self.first(x).tanh()
        if self.mix == "attention":
            h = h + (h @ h.mT).softmax(-1) @ h
        elif self.mix == "causal":
            h = h.cumsum(1)
        elif self.mix == "pooled":
            h = h + self.first(x.mean(1, keepdim=True))
        z = self.second(h)
        return z.flatten(0, 1) if self.flat else z.movedim(-1, 1)


def models(mix=None):
    """The same, flat and not, with data; in float64."""
    torch.manual_seed(0)
    flat, apart = Sequences(True, mix).double(), Sequences(False, mix).double()
    apart.load_state_dict(flat.state_dict())
    x, y = torch.randn(N, T, 3).double(), torch.randint(3, (N, T))
    return flat, apart, x, y


@pytest.mark.parametrize("mix", ["attention", "causal", "pooled"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_rows_that_meet_are_refused_for_type_2(mix, approximation):
    flat, apart, x, y = models(mix)
    loss_fn, options = nn.CrossEntropyLoss(), {"approximation": approximation}
    with pytest.raises(ValueError, match=r"\[20, 3\].*layers \['.*first'\].*fisher='mc'"):
        kfac_tn.compute_kfac(flat, loss_fn, [(x, y.flatten())], fisher="type-2", **options)
    optimizer = kfac_tn.KFAC(flat, loss_fn, fisher="type-2", **options)
    with pytest.raises(ValueError, match=r"\[20, 3\].*layers \['.*first'\].*fisher='mc'"):
        loss_fn(flat(x), y.flatten()).backward()
    optimizer.close()
    options |= {"fisher": "mc", "mc_samples": 2000}
    sampled = kfac_tn.compute_kfac(flat, loss_fn, [(x, y.flatten())], **options)
    exact = kfac_tn.compute_kfac(apart, loss_fn, [(x, y)], approximation, "type-2")
    for name, block in exact.blocks.items():
        B, mean = block.grad_output_factor, sampled.blocks[name].grad_output_factor
        assert relative_error(mean, B) < 0.1


def test_rows_that_are_apart_are_not():
    """Also of layers that have several positions for each, or see all rows as examples."""
    flat, apart, x, y = models()
    loss_fn = nn.CrossEntropyLoss()
    actual = kfac_tn.compute_kfac(flat, loss_fn, [(x, y.flatten())], "expand", "type-2")
    expected = kfac_tn.compute_kfac(apart, loss_fn, [(x, y)], "expand", "type-2")
    for name, block in expected.blocks.items():
        B = block.grad_output_factor
        assert relative_error(actual.blocks[name].grad_output_factor, B) < 1e-12
    patches = nn.Sequential(nn.Flatten(0, 1), nn.Linear(3, 4), nn.Unflatten(0, (N, T)))
    model = nn.Sequential(patches, nn.Flatten(), nn.Tanh(), nn.Linear(4 * T, 3)).double()
    kfac_tn.compute_kfac(model, loss_fn, [(x, y[:, 0])], "expand", "type-2")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kfac_tn.compute_kfac(flat.float(), loss_fn, [(x.float(), y.flatten())], fisher="type-2")


def test_one_output_of_a_layer_can_be_mixed_too():
    """Whose gradients are all parallel: their lengths tell."""
    model = nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1, groups=2), nn.Conv2d(2, 3, 3), nn.Flatten(2)
    ).double()
    loss_fn, x = nn.CrossEntropyLoss(), torch.randn(2, 2, 4, 4).double()
    forward = lambda model, x: (model(x).mT.flatten(0, 1), torch.zeros(8).long())  # noqa: E731
    with pytest.raises(ValueError, match=r"layers \['0'\]"):
        kfac_tn.compute_kfac(model, loss_fn, [x], fisher="type-2", forward=forward)


@pytest.mark.parametrize("mix", [None, "attention"])
def test_families_without_rows_are_looked_at_too(mix, monkeypatch):
    def lacking(self, module, g):
        raise NotImplementedError

    flat, _, x, y = models(mix)
    monkeypatch.setattr(LinearFamily, "grad_output_rows", lacking)
    compute = lambda: kfac_tn.compute_kfac(  # noqa: E731
        flat, nn.CrossEntropyLoss(), [(x, y.flatten())], fisher="type-2"
    )
    if mix is None:
        assert len(compute().blocks) == 2
    else:
        with pytest.raises(ValueError, match="fisher='type-2' needs"):
            compute()


class TimeFirst(nn.Module):
    """Its first layer has the examples on the second axis."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.second(self.first(x.transpose(0, 1)).tanh().mean(0))


@pytest.mark.parametrize("curvature", ["ekfac", "diagonal"])
@pytest.mark.parametrize("fisher", ["mc", "type-2", "empirical"])
@pytest.mark.parametrize("times", [N, N + 1])
def test_examples_on_another_axis_of_the_same_size(curvature, fisher, times):
    model, loss_fn = TimeFirst().double(), nn.CrossEntropyLoss()
    data = [(torch.randn(N, times, 3).double(), torch.randint(2, (N,)))]
    compute = kfac_tn.compute_ekfac if curvature == "ekfac" else kfac_tn.compute_kfac
    options = {} if curvature == "ekfac" else {"curvature": curvature}
    with pytest.raises(ValueError, match=r"layer 'first'.*(first axis|another axis)"):
        compute(model, loss_fn, data, fisher=fisher, **options)


@pytest.mark.parametrize("normalized", [False, True])
def test_channels_may_be_as_many_as_examples(normalized):
    """And examples may be normalized together, as in training."""
    norm = nn.BatchNorm2d(N) if normalized else nn.Identity()
    layers = [nn.Conv2d(1, N, 3, padding=1), norm, nn.Tanh(), nn.Conv2d(N, N, 3), nn.Flatten()]
    model, loss_fn = nn.Sequential(*layers, nn.Linear(4 * N, 3)).double(), nn.CrossEntropyLoss()
    x, y = torch.randn(N, 1, 4, 4).double(), torch.randint(3, (N,))
    if normalized:  # of the curvature of a data set, there is none that were exact
        optimizer = kfac_tn.KFAC(model, loss_fn, curvature="ekfac", fisher="type-2")
        for _ in range(2):
            loss_fn(model(x), y).backward()
            optimizer.step()
        with pytest.raises(ValueError, match=r"BatchNorm2d '1' .* model.eval\(\)"):
            kfac_tn.compute_ekfac(model, loss_fn, [(x, y)], fisher="type-2")
    else:
        curvature = kfac_tn.compute_ekfac(model, loss_fn, [(x, y)], fisher="type-2")
        exact = dense_ggn(model, loss_fn, x, y).trace()
        torch.testing.assert_close(curvature.trace(), exact)


# Examples that models mix, or take in another order, by what they contain ------------------------


class Sorted(nn.Module):
    """One encoder for two inputs, each sorted by its own key, as for packed sequences."""

    def __init__(self, in_order):
        super().__init__()
        torch.manual_seed(0)
        self.in_order, self.encoder, self.last = in_order, nn.Linear(3, 4), nn.Linear(4, 2)

    def encode(self, x, column):
        if self.in_order:
            return self.encoder(x).tanh()
        order = x[:, column].argsort()
        return self.encoder(x[order])[order.argsort()].tanh()

    def forward(self, x):
        return self.last(self.encode(x, 0) + self.encode(2 * x, 1))


class Scaled(nn.Module):
    """By the largest number in the batch, as for quantization."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.first(x)
        return self.last(h / h.abs().max())


CORRECTED = {
    "ekfac": lambda *a, **k: kfac_tn.compute_ekfac(*a, **k),
    "diagonal": lambda *a, **k: kfac_tn.compute_kfac(*a, curvature="diagonal", **k),
    "reduce": lambda *a, **k: kfac_tn.compute_kfac(*a, approximation="reduce", **k),
}


def inputs(largest=0, n=8):
    generator = torch.Generator().manual_seed(largest)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    x[largest % n] *= 10
    return x, torch.randn(n, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("fisher", ["mc", "type-2"])
@pytest.mark.parametrize("compute", CORRECTED.values(), ids=CORRECTED)
def test_calls_with_the_examples_in_several_orders_are_refused(compute, fisher, batches):
    """Row by row they don't belong together; in one order they do."""
    sorted_ones = torch.linspace(-1, 1, 8).double()[:, None].expand(8, 3).contiguous()
    data = [(sorted_ones, inputs()[1]), inputs()][-batches:]
    with pytest.raises(ValueError, match=r"rows of layers \['encoder'\] depend"):
        compute(Sorted(False).double(), nn.MSELoss(), data, fisher=fisher)
    compute(Sorted(True).double(), nn.MSELoss(), data, fisher=fisher)


def test_sums_of_products_need_no_order():
    """KFAC-expand adds up positions of all calls, whichever example's they are."""
    data = [inputs()]
    factors = [
        kfac_tn.compute_kfac(Sorted(each).double(), nn.MSELoss(), data, fisher="type-2")
        for each in (True, False)
    ]
    torch.testing.assert_close(factors[0].to_dense(), factors[1].to_dense())


@pytest.mark.parametrize("largest", range(8))
@pytest.mark.parametrize("compute", ["ekfac", "diagonal"])
def test_examples_that_meet_in_a_layer_are_refused(compute, largest):
    with pytest.raises(ValueError, match=r"rows of layers \['first'\] depend"):
        CORRECTED[compute](Scaled().double(), nn.MSELoss(), [inputs(largest)], fisher="type-2")


@pytest.mark.parametrize("curvature", ["ekfac", "diagonal"])
def test_the_optimizer_refuses_them_too(curvature):
    model, loss_fn = Scaled().double(), nn.MSELoss()
    optimizer = kfac_tn.KFAC(model, loss_fn, curvature=curvature, fisher="type-2")
    if curvature == "ekfac":  # of which the first step has factors alone
        loss_fn(model(inputs()[0]), inputs()[1]).backward()
        optimizer.step()
    loss = loss_fn(model(inputs()[0]), inputs()[1])
    with pytest.raises(ValueError, match=r"rows of layers \['first'\] depend"):
        loss.backward()


@pytest.mark.parametrize("compute", CORRECTED.values(), ids=CORRECTED)
def test_random_gradients_are_refused(compute):
    conv = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)).double()
    model = kfac_tn.tn.nn.randomize(conv, keep=0.5, keep_output=0.5)
    data = [(torch.randn(4, 1, 4, 4).double(), torch.randn(4, 2).double())]
    with pytest.raises(ValueError, match=r"RandomizedConvNd '0' .* model.eval\(\)"):
        compute(model.train(), nn.MSELoss(), data)
    compute(model.eval(), nn.MSELoss(), data)
