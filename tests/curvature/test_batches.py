"""Batches of any structure: what comes out is what pairs give."""

from __future__ import annotations

import sys
from collections import UserDict, namedtuple
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

import kfac_tn
from kfac_tn.curvature.batches import copied
from kfac_tn.testing import relative_error


@dataclass(frozen=True)
class Record:
    """As batches of graphs or texts are, unknown to torch."""

    ids: Tensor
    x: Tensor


class TwoInputs(nn.Module):
    """Indices and numbers in, called in several ways; an embedding goes example by example."""

    def __init__(self):
        super().__init__()
        self.embedding, self.hidden, self.head = (
            nn.Embedding(5, 3),
            nn.Linear(2, 3),
            nn.Linear(3, 2),
        )

    def forward(self, both, x: Tensor | None = None, scale: float = 1.0) -> Tensor:
        if x is not None:
            both = {"ids": both, "x": x}
        both = vars(both) if isinstance(both, Record) else both
        ids, x = both if isinstance(both, tuple) else (both["ids"], both["x"])
        return scale * self.head((self.embedding(ids).mean(1) + self.hidden(x)).tanh())


Named = namedtuple("Named", ["ids", "x", "labels"])

# What the loader gives, and what is to be done with it (nothing to be said for pairs).
STRUCTURES = {
    "a pair with a tuple": (lambda i, x, y: ((i, x), y), None),
    "a pair with a dict": (lambda i, x, y: [{"ids": i, "x": x}, y], None),
    "a pair with a dict-like": (lambda i, x, y: (UserDict(ids=i, x=x), y), None),
    "a pair with a dataclass": (lambda i, x, y: (Record(i, x), y), None),
    "three": (lambda i, x, y: [i, x, y], lambda model, b: (model(b[0], b[1]), b[2])),
    "a named tuple": (Named, lambda model, b: (model(b.ids, x=b.x), b.labels)),
    "a dict": (
        lambda i, x, y: {"ids": i, "x": x, "labels": y, "scale": 1.0},
        lambda model, b: (model(b["ids"], x=b["x"], scale=b["scale"]), b["labels"]),
    ),
    "a dict-like": (
        lambda i, x, y: UserDict(ids=i, x=x, labels=y, text=["a"] * len(y)),
        lambda model, b: (model(b), b["labels"]),
    ),
    "a tensor": (
        lambda i, x, y: torch.cat([i.double(), x, y[:, None].double()], dim=1),
        lambda model, b: (model(b[:, :4].long(), b[:, 4:6]), b[:, 6].long()),
    ),
}


def diagonal(mode: str):
    def compute(model, loss_fn, loader, **options):
        entries = kfac_tn.compute_ggn_diagonal(model, loss_fn, loader, mode, **options)
        return torch.cat([entry.flatten() for entry in entries.values()])

    return compute


def dense(compute, fisher: str):
    def run(model, loss_fn, loader, **options):
        if fisher == "forward-only":
            model.embedding.requires_grad_(False)
        return compute(model, loss_fn, loader, fisher=fisher, **options).to_dense()

    return run


COMPUTE = {
    "exact diagonal": diagonal("exact"),
    "sampled diagonal": diagonal("mc"),
    **{
        f"KFAC, {fisher}": dense(kfac_tn.compute_kfac, fisher)
        for fisher in ("mc", "type-2", "empirical", "forward-only")
    },
    **{
        f"EKFAC, {fisher}": dense(kfac_tn.compute_ekfac, fisher)
        for fisher in ("mc", "type-2", "empirical")
    },
}


def problem():
    torch.manual_seed(0)
    model, loss_fn = TwoInputs().double(), nn.CrossEntropyLoss()
    parts = [
        (torch.randint(5, (n, 4)), torch.randn(n, 2).double(), torch.randint(2, (n,)))
        for n in (3, 2)
    ]
    return model, loss_fn, parts


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("compute", COMPUTE)
def test_structures(compute, structure):
    model, loss_fn, parts = problem()
    results = []
    for name in ("a pair with a tuple", structure):
        make, forward = STRUCTURES[name]
        options = {} if forward is None else {"forward": forward}
        options["generator"] = torch.Generator().manual_seed(1)
        loader = [make(*part) for part in parts]
        results.append(COMPUTE[compute](model, loss_fn, loader, **options))
    assert results[0].any()
    assert relative_error(*reversed(results)) < 1e-12


@pytest.mark.parametrize("inputs", [tuple, dict, UserDict, Record])
def test_per_example_gradients_take_inputs_of_any_structure(inputs):
    model, loss_fn, ((ids, x, y), _) = problem()
    both = (ids, x) if inputs is tuple else inputs(ids=ids, x=x)
    gradients = kfac_tn.compute_per_example_gradients(model, loss_fn, both, y)
    for n in range(len(y)):
        model.zero_grad()
        (loss_fn(model((ids[n : n + 1], x[n : n + 1])), y[n : n + 1]) / len(y)).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name][n], parameter.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("structure", [s for s, (_, forward) in STRUCTURES.items() if forward])
def test_what_is_ambiguous_is_refused(compute, structure):
    """Also a dict or a tensor of two, which could be unpacked."""
    model, loss_fn, parts = problem()
    batch = STRUCTURES[structure][0](*parts[1])
    with pytest.raises(TypeError, match=rf"is a {type(batch).__name__}.*forward=lambda"):
        COMPUTE[compute](model, loss_fn, [batch])


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize(
    ("forward", "kind"),
    [
        (lambda model, batch: model(batch[0])[:2], "Tensor"),
        (lambda model, batch: (model(batch[0]), batch[1], None), "tuple of 3"),
    ],
)
def test_a_forward_that_returns_no_pair_is_refused(compute, forward, kind):
    """Also a tensor of two rows, which could be unpacked."""
    model, loss_fn, parts = problem()
    loader = [((ids, x), y) for ids, x, y in parts]
    with pytest.raises(TypeError, match=rf"forward returned a {kind}, not a pair"):
        COMPUTE[compute](model, loss_fn, loader, forward=forward)


class Packed(TwoInputs):
    """Returns more than a tensor."""

    def forward(self, both) -> dict[str, Tensor]:
        return {"logits": super().forward(both)}


@pytest.mark.parametrize("compute", COMPUTE)
def test_outputs_that_are_no_tensor(compute):
    _, loss_fn, parts = problem()
    torch.manual_seed(0)
    model, loader = Packed().double(), [((ids, x), y) for ids, x, y in parts]
    with pytest.raises(TypeError, match=r"returned.* dict: .*forward=lambda model, batch"):
        COMPUTE[compute](model, loss_fn, loader)
    result = COMPUTE[compute](
        model, loss_fn, loader, forward=lambda model, batch: (model(batch[0])["logits"], batch[1])
    )
    assert result.any()


def test_per_example_gradients_of_outputs_that_are_no_tensor():
    plain, loss_fn, ((ids, x, y), _) = problem()
    torch.manual_seed(0)
    model = Packed().double()
    with pytest.raises(TypeError, match=r"returned a dict: .*forward=lambda model, batch"):
        kfac_tn.compute_per_example_gradients(model, loss_fn, (ids, x), y)
    actual = kfac_tn.compute_per_example_gradients(
        model, loss_fn, (ids, x), y, lambda model, batch: (model(batch[0])["logits"], batch[1])
    )
    expected = kfac_tn.compute_per_example_gradients(plain, loss_fn, (ids, x), y)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("compute", COMPUTE)
def test_progress_bar(compute, capsys):
    model, loss_fn, parts = problem()
    loader = [((ids, x), y) for ids, x, y in parts]
    COMPUTE[compute](model, loss_fn, loader)
    assert capsys.readouterr() == ("", "")
    COMPUTE[compute](model, loss_fn, loader, progress_bar=True)
    out, err = capsys.readouterr()
    assert out == ""
    titles = {"E": ["KFAC", "EKFAC"], "K": ["KFAC"]}.get(compute[0], ["GGN diagonal"])
    for title in titles:
        assert f"{title}: 100%" in err
    assert err.count("2/2") >= len(titles)


def test_progress_bar_without_tqdm(monkeypatch):
    model, loss_fn, parts = problem()
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="pip install tqdm"):
        kfac_tn.compute_kfac(model, loss_fn, parts, progress_bar=True)


@dataclass
class Node:
    """Of a tree that knows its parents; ``late`` may never be set."""

    value: Tensor
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)
    late: int = field(init=False)


def test_structures_that_refer_to_themselves_are_copied_once():
    root = Node(torch.ones(2))
    leaf = Node(torch.zeros(2), root)
    root.children += [leaf, leaf]
    twin = copied({"root": root, "again": leaf})
    one, other = twin["root"].children
    assert one is other is twin["again"]
    assert one.parent is twin["root"] is not root
    root.value.zero_()
    assert torch.equal(twin["root"].value, torch.ones(2))
