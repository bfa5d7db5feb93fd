"""The algebra of curvatures of all kinds of blocks against dense matrices, in float64."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Size, Tensor

import kfac_tn
import kfac_tn.testing
from kfac_tn.curvature.block import Block, DiagonalBlock
from kfac_tn.curvature.eigen import EigenBlock, SumBlock
from kfac_tn.curvature.kronecker import KroneckerBlock
from kfac_tn.curvature.layout import Layout

CLOSE = {"rtol": 1e-8, "atol": 1e-8}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, **CLOSE)


# Blocks, and their matrices by definition --------------------------------------------------------


def factor(groups: int, size: int, rank: int) -> Tensor:
    root = torch.randn(groups, size, rank, dtype=torch.float64)
    return root @ root.mT


def basis(groups: int, size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(groups, size, size, dtype=torch.float64)).Q.contiguous()


def with_last(matrices: Tensor) -> Tensor:
    """Append a row and a column with a 1."""
    one = torch.ones(1, 1, dtype=matrices.dtype)
    return torch.stack([torch.block_diag(matrix, one) for matrix in matrices])


def arrange(layout: Layout, matrices: list[Tensor]) -> Tensor:
    """From the matrices of the groups, by rows of (weight, bias), to all weights, all biases."""
    joint = torch.block_diag(*matrices)
    weight = torch.arange(len(joint)).view(layout.groups, layout.rows, -1)
    bias = weight[..., :0]
    if layout.bias_name is not None:
        weight, bias = weight[..., :-1], weight[..., -1:]
    if layout.transposed:
        channels = layout.weight_shape[0] // layout.groups
        weight = weight.unflatten(-1, (channels, -1)).transpose(1, 2)
    order = torch.cat([weight.flatten(), bias.flatten()])
    return joint[order][:, order]


def make_block(kind: str, name: str, layout: Layout, bias: str, rank: int) -> tuple[Block, Tensor]:
    """A block with random entries, and its matrix."""
    groups, rows, columns = layout.groups, layout.rows, layout.columns
    if kind == "diagonal":
        values = torch.rand(layout.weight_shape, dtype=torch.float64)
        return DiagonalBlock(layout.weight_name, values), values.flatten().diag()
    coupled = bias == "joint" and layout.bias_name is not None
    has_own = bias == "separate" and layout.bias_name is not None
    if kind == "kronecker":
        a, b = factor(groups, columns + coupled, rank), factor(groups, rows, rank)
        full = with_last(a) if has_own else a
        matrices = [torch.kron(b[g], full[g]) for g in range(groups)]
        return KroneckerBlock(layout, a, b, bias), arrange(layout, matrices)
    q_a, q_b = basis(groups, columns + coupled), basis(groups, rows)
    q_a = with_last(q_a) if has_own else q_a
    values = torch.rand(groups, rows, q_a.shape[-1], dtype=torch.float64)
    bases = [torch.kron(q_b[g], q_a[g]) for g in range(groups)]
    matrices = [q @ values[g].flatten().diag() @ q.T for g, q in enumerate(bases)]
    return EigenBlock(layout, q_a, q_b, values, bias), arrange(layout, matrices)


RECIPES = st.lists(
    st.tuples(
        st.sampled_from(["kronecker", "eigen", "diagonal"]),
        st.integers(1, 2),  # groups
        st.integers(1, 2),  # rows in each
        st.sampled_from([(1,), (3,), (2, 1, 2)]),  # shape of a row
        st.sampled_from([None, "joint", "separate"]),
        st.integers(1, 4),  # rank of factors
        st.booleans(),  # transposed
    ),
    min_size=1,
    max_size=3,
)


def make_curvature(recipes, seed: int) -> tuple[kfac_tn.Curvature, Tensor]:
    """A curvature whose parameters lie in another order than its blocks, and its matrix."""
    torch.manual_seed(seed)
    blocks, matrices, shapes = {}, [], {}
    for index, (kind, groups, rows, row, bias, rank, transposed) in enumerate(recipes):
        shape = Size((groups * rows, *row))
        if transposed:
            shape = Size((groups * row[0], rows, *row[1:]))
        name, weight = f"layer{index}", f"layer{index}.weight"
        bias_name = None if bias is None or kind == "diagonal" else f"layer{index}.bias"
        layout = Layout(weight, shape, bias_name, groups, transposed)
        blocks[name], matrix = make_block(kind, name, layout, bias or "separate", rank)
        matrices.append(matrix)
        shapes[weight] = shape
        if bias_name is not None:
            shapes[bias_name] = Size([groups * rows])
    order = torch.randperm(len(shapes), generator=torch.Generator().manual_seed(len(shapes)))
    ordered = {list(shapes)[place]: list(shapes.values())[place] for place in order}
    places = index_of(shapes, list(ordered))
    return kfac_tn.Curvature(blocks, ordered), torch.block_diag(*matrices)[places][:, places]


def index_of(shapes, names) -> Tensor:
    """Where the entries of some parameters are in a flat vector."""
    sizes = [shape.numel() for shape in shapes.values()]
    places = dict(zip(shapes, torch.arange(sum(sizes)).split(sizes), strict=True))
    return torch.cat([places[name] for name in names])


def flat(entries: dict[str, Tensor]) -> Tensor:
    return torch.cat([entry.flatten() for entry in entries.values()])


def dense_function(matrix: Tensor, function) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ function(values.clamp(min=0)).diag() @ vectors.T


# Everything equals its dense counterpart ---------------------------------------------------------


@settings(max_examples=60)
@given(RECIPES, st.integers(0, 1000), st.sampled_from([None, 0, 1, 3]))
def test_products(recipes, seed, columns):
    curvature, dense = make_curvature(recipes, seed)
    batch = () if columns is None else (columns,)
    v = torch.randn(len(dense), *batch, dtype=torch.float64)
    close(curvature @ v, dense @ v)
    pieces = v.split([shape.numel() for shape in curvature.shapes.values()])
    named = {
        name: piece.reshape(*shape, *batch)
        for piece, (name, shape) in zip(pieces, curvature.shapes.items(), strict=True)
    }
    product = curvature @ dict(reversed(named.items()))
    assert list(product) == list(curvature.shapes)
    assert all(product[name].shape == entry.shape for name, entry in named.items())
    close(
        torch.cat([product[n].reshape(s.numel(), *batch) for n, s in curvature.shapes.items()]),
        dense @ v,
    )


@settings(max_examples=60)
@given(RECIPES, st.integers(0, 1000), st.sampled_from([1e-2, 1.0, 30.0]))
def test_functions_of_eigenvalues(recipes, seed, damping):
    curvature, dense = make_curvature(recipes, seed)
    eye = torch.eye(len(dense), dtype=torch.float64)
    damped = dense + damping * eye
    close(curvature.to_dense(), dense)
    close(flat(curvature.diagonal()), dense.diagonal())
    close(curvature.trace(), dense.trace())
    close(curvature.frobenius_norm(), dense.norm())
    close(curvature.eigenvalues(), torch.linalg.eigvalsh(dense))
    for each in (damping, torch.tensor(damping, dtype=torch.float64)):
        close(curvature.inverse(each).to_dense(), damped.inverse())
        close(curvature.logdet(each), damped.logdet())
    close(curvature.det(damping), damped.det())
    close(curvature.sqrt(damping).to_dense(), dense_function(damped, torch.sqrt))
    root = curvature.sqrt().to_dense()
    close(root @ root, dense)
    # Inverses and roots are curvatures themselves.
    inverse, expected = curvature.inverse(damping), damped.inverse()
    close(flat(inverse.diagonal()), expected.diagonal())
    close(inverse.trace(), expected.trace())
    close(inverse.frobenius_norm(), expected.norm())
    close(inverse.logdet(), -damped.logdet())
    close(inverse.inverse(0.5).to_dense(), (expected + 0.5 * eye).inverse())


def split_inverse(block: KroneckerBlock, damping: float) -> Tensor:
    """The inverse of (B + sqrt(damping) / pi I) (x) (A + sqrt(damping) pi I), by definition."""
    inverses = []
    for a, b in zip(block.input_factor, block.grad_output_factor, strict=True):
        if block.layout.bias_name is not None and block.bias == "separate":
            a = with_last(a[None])[0]
        pi = ((a.trace() / len(a)) / (b.trace() / len(b))).sqrt()
        a = a + damping**0.5 * pi * torch.eye(len(a)).double()
        b = b + damping**0.5 / pi * torch.eye(len(b)).double()
        inverses.append(torch.kron(b, a).inverse())
    return arrange(block.layout, inverses)


@settings(max_examples=60)
@given(RECIPES, st.integers(0, 1000), st.sampled_from([1e-2, 1.0, 30.0]))
def test_damping_split_between_factors(recipes, seed, damping):
    recipes = [("diagonal" if kind == "eigen" else kind, *rest) for kind, *rest in recipes]
    curvature, dense = make_curvature(recipes, seed)
    inverse = curvature.inverse(damping, "pi")
    for name, block in curvature.blocks.items():
        places = index_of(curvature.shapes, block.names)
        part = dense[places][:, places]
        if isinstance(block, KroneckerBlock):
            expected = split_inverse(block, damping)
        else:
            expected = (part + damping * torch.eye(len(part)).double()).inverse()
        close(inverse.to_dense()[places][:, places], expected)
        close(inverse.blocks[name].trace(), expected.trace())


@settings(max_examples=40)
@given(RECIPES, st.integers(0, 1000), st.sampled_from([1e-2, 1.0, 30.0]))
def test_samples_are_a_root_of_the_inverse_times_noise(recipes, seed, damping):
    curvature, dense = make_curvature(recipes, seed)
    eye = torch.eye(len(dense), dtype=torch.float64)
    n = len(dense)
    with pytest.MonkeyPatch.context() as patch:  # for the noise, every unit vector
        rows = iter(eye.split([shape.numel() for shape in curvature.shapes.values()], dim=1))
        patch.setattr(torch, "randn", lambda shape, **kwargs: next(rows).reshape(shape))
        samples = curvature.sample(damping, n)
    root = torch.cat([entry.reshape(n, -1) for entry in samples.values()], dim=1)
    close(root.T @ root, (dense + damping * eye).inverse())


@settings(max_examples=40)
@given(RECIPES, st.integers(0, 1000))
def test_sums_and_scalings(recipes, seed):
    first, dense = make_curvature(recipes, seed)
    second, other = make_curvature(recipes, seed + 1)
    for scaled in (2.5 * first, first * 2.5, first * torch.tensor(2.5).double()):
        assert {type(b) for b in scaled.blocks.values()} == {type(b) for b in first.blocks.values()}
        close(scaled.to_dense(), 2.5 * dense)
        close(scaled.logdet(0.1), (2.5 * dense + 0.1 * torch.eye(len(dense)).double()).logdet())
    total, expected = first + 0.5 * second + first.inverse(1.0), dense + 0.5 * other
    expected = expected + (dense + torch.eye(len(dense)).double()).inverse()
    for curvature, matrix in ((total, expected), (3 * total, 3 * expected)):
        close(curvature.to_dense(), matrix)
        close(flat(curvature.diagonal()), matrix.diagonal())
        close(curvature.trace(), matrix.trace())
        close(curvature.frobenius_norm(), matrix.norm())
    for name, block in total.blocks.items():
        kind = DiagonalBlock if isinstance(first.blocks[name], DiagonalBlock) else SumBlock
        assert isinstance(block, kind)
        if kind is SumBlock:
            for refused in (
                lambda: total.inverse(1.0),
                lambda: total.inverse(1.0, "pi"),
                lambda: total.logdet(1.0),
                total.eigenvalues,
                total.sqrt,
                lambda: total.sample(1.0),
            ):
                with pytest.raises(ValueError, match=r"layer.*sum of Kronecker.*to_dense"):
                    refused()


@settings(max_examples=40)
@given(RECIPES, st.integers(0, 1000), st.randoms(use_true_random=False))
def test_submatrices(recipes, seed, random):
    curvature, dense = make_curvature(recipes, seed)
    total, doubled = curvature + curvature, 2 * dense
    names = random.sample(list(curvature.shapes), random.randint(1, len(curvature.shapes)))
    torn = [
        block
        for block in curvature.blocks.values()
        if isinstance(block, EigenBlock) and block.bias == "joint"
        if block.layout.weight_name in names and not set(block.names) <= set(names)
    ]
    if torn:
        with pytest.raises(ValueError, match=r"couples .*weight.* and .*bias='separate'"):
            curvature.submatrix(names)
        return
    for whole, matrix in ((curvature, dense), (total, doubled)):
        part = whole.submatrix(names)
        assert list(part.shapes) == [name for name in curvature.shapes if name in names]
        places = index_of(curvature.shapes, list(part.shapes))
        close(part.to_dense(), matrix[places][:, places])
        close(part.trace(), matrix[places, places].sum())
        if whole is curvature:
            eye = torch.eye(len(places), dtype=torch.float64)
            close(part.logdet(0.1), (matrix[places][:, places] + 0.1 * eye).logdet())


def test_submatrices_by_whatever_yields_names():
    curvature, _ = make_curvature(MIXED, 0)
    names = ["layer2.weight", "layer0.weight", "layer0.bias"]
    expected = curvature.submatrix(names)
    for same in ((name for name in names), dict.fromkeys(names), set(names), iter(names)):
        part = curvature.submatrix(same)
        assert part.shapes == expected.shapes
        assert torch.equal(part.to_dense(), expected.to_dense())


@settings(max_examples=30)
@given(RECIPES, st.integers(0, 1000))
def test_files_and_moves(recipes, seed):
    curvature, dense = make_curvature(recipes, seed)
    for each in (curvature, curvature.inverse(1.0), curvature + curvature):
        file = io.BytesIO()
        each.save(file)
        file.seek(0)
        loaded = kfac_tn.Curvature.load(file)
        assert loaded.shapes == each.shapes
        assert {name: type(block) for name, block in loaded.blocks.items()} == {
            name: type(block) for name, block in each.blocks.items()
        }
        assert torch.equal(loaded.to_dense(), each.to_dense())
        assert all(isinstance(shape, Size) for shape in loaded.shapes.values())
        single = loaded.to(torch.float32)
        assert single.to_dense().dtype == torch.float32
        torch.testing.assert_close(
            single.to_dense().double(), each.to_dense(), rtol=1e-4, atol=1e-4
        )
        assert single.to(device="meta").trace().is_meta
    close(loaded.submatrix(list(curvature.shapes)).to_dense(), 2 * dense)


# Samples -----------------------------------------------------------------------------------------

MIXED = [
    ("kronecker", 2, 2, (2,), "joint", 1, False),
    ("eigen", 1, 1, (2,), "separate", 1, True),
    ("diagonal", 1, 2, (1,), None, 1, False),
]


@pytest.mark.parametrize("damping", [0.1, 2.0])
def test_samples_have_the_damped_inverse_as_covariance(damping):
    curvature, dense = make_curvature(MIXED, 0)
    n, generator = 100_000, torch.Generator().manual_seed(0)
    samples = curvature.sample(damping, n, generator)
    assert {name: s.shape[1:] for name, s in samples.items()} == curvature.shapes
    rows = torch.cat([entry.reshape(n, -1) for entry in samples.values()], dim=1)
    expected = (dense + damping * torch.eye(len(dense)).double()).inverse()
    # A sample covariance of P dimensions is off by about the root of P / n.
    bound = 3 * math.sqrt(len(dense) / n)
    assert kfac_tn.testing.relative_error(rows.T @ rows / n, expected) < bound
    assert (rows.mean(0).abs() < 5 * (expected.diagonal() / n).sqrt()).all()


def test_samples_are_those_of_the_generator():
    curvature, _ = make_curvature(MIXED, 0)
    before = torch.get_rng_state()
    one = curvature.sample(1.0, generator=torch.Generator().manual_seed(3))
    same = curvature.sample(1.0, 1, torch.Generator().manual_seed(3))
    assert torch.equal(before, torch.get_rng_state())
    assert {name: entry.shape for name, entry in one.items()} == curvature.shapes
    assert all(torch.equal(one[name], same[name][0]) for name in one)
    torch.manual_seed(3)
    for name, entry in curvature.sample(1.0).items():
        assert torch.equal(entry, one[name])


# Details -----------------------------------------------------------------------------------------


def test_logdet_is_differentiable_in_the_damping():
    curvature, dense = make_curvature(MIXED, 0)
    damping = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(curvature.logdet(damping), damping)
    close(gradient, (dense + 0.3 * torch.eye(len(dense)).double()).inverse().trace())


def test_singular_without_damping():
    curvature, _ = make_curvature([("kronecker", 1, 2, (3,), None, 1, False)], 0)
    zero = 0.0 * curvature
    assert zero.logdet() == -math.inf
    assert zero.det() == 0
    assert zero.logdet(1.0) == 0


SINGULAR = {
    "kronecker": [("kronecker", 1, 2, (3,), None, 1, False)],
    "eigen": [("kronecker", 1, 2, (3,), "joint", 1, False)],
    "diagonal": [("diagonal", 1, 2, (3,), None, 1, False)],
}


@pytest.mark.parametrize(
    ("dtype", "damping"), [(torch.float32, 1e-50), (torch.half, 1e-9), (torch.half, 1e-5)]
)
@pytest.mark.parametrize("kind", SINGULAR)
def test_dampings_that_the_dtype_does_not_hold(kind, dtype, damping):
    """Refused where they are needed, taken where they are not; double precision holds them."""
    double, _ = make_curvature(SINGULAR[kind], 0)
    if kind == "eigen":
        double = kfac_tn.Curvature({n: b.eigen() for n, b in double.blocks.items()}, double.shapes)
    if kind == "diagonal":
        double.blocks["layer0"].values[0] = 0
    singular = double.to(dtype)
    for refused in (
        singular.inverse,
        lambda each: singular.inverse(each, "pi" if kind == "kronecker" else "exact"),
        singular.logdet,
        singular.det,
        singular.sample,
    ):
        for each in (damping, torch.tensor(damping, dtype=torch.float64)):
            with pytest.raises(ValueError, match=r"too small for torch.*layer0.*float64"):
                refused(each)
    assert singular.logdet() == -math.inf
    assert singular.sqrt(damping).trace().isfinite()
    assert double.inverse(damping).trace().isfinite()
    assert double.logdet(damping).isfinite()
    least = float(torch.finfo(dtype).tiny)
    v = torch.ones(len(singular.eigenvalues()), dtype=dtype)
    assert (singular.inverse(least) @ v).isfinite().all()
    assert singular.logdet(least).isfinite()
    assert all(entry.isfinite().all() for entry in singular.sample(least).values())
    regular = singular.inverse(1.0)  # itself a curvature
    assert (regular.inverse(damping) @ v).isfinite().all()


def test_only_small_dampings_and_large_factors_are_looked_at(monkeypatch):
    """Devices are waited for where a result might not be finite, and nowhere else."""
    curvature, _ = make_curvature(MIXED, 0)
    single = curvature.to(torch.float32)
    single.eigenvalues()  # whose decompositions wait for themselves
    looks = []
    for name in ("__bool__", "tolist"):
        plain = getattr(Tensor, name)
        monkeypatch.setattr(
            Tensor, name, lambda self, _f=plain: looks.append(1) or _f(self), raising=True
        )
    for call in (
        lambda: single.inverse(1e-30),
        lambda: single.logdet(1e-30),
        lambda: 0.5 * single,
        lambda: single.to(torch.float64),
        lambda: single.to("cpu"),
    ):
        call()
        assert not looks
    2 * single
    assert len(looks) == 1


def test_one_decomposition_serves_all(monkeypatch):
    curvature, _ = make_curvature([("kronecker", 1, 2, (3,), None, 3, False)], 0)
    calls = []
    plain = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: calls.append(m.shape[-1]) or plain(m))
    for damping in (0.1, 1.0):
        curvature.inverse(damping)
        curvature.inverse(damping, "pi")
        curvature.logdet(damping)
        curvature.sample(damping)
    assert calls == [3, 2]


def test_a_decomposition_that_does_not_converge_is_made_in_float64(monkeypatch):
    curvature, dense = make_curvature([("kronecker", 1, 2, (3,), None, 3, False)], 0)
    plain = torch.linalg.eigh

    def stubborn(matrix):
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return plain(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", stubborn)
    inverse = curvature.to(torch.float32).inverse(1.0).to_dense()
    assert inverse.dtype == torch.float32
    expected = (dense + torch.eye(len(dense)).double()).inverse()
    torch.testing.assert_close(inverse.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda c: -1 * c, "-1.*at least 0"),
        (lambda c: math.nan * c, "nan"),
        (lambda c: math.inf * c, "factor is inf.*finite"),
        (lambda c: c * torch.tensor(math.inf), "factor is .*inf.*finite"),
        (lambda c: c * torch.ones(2), "factor is tensor.*scalar"),
        (lambda c: c.to(torch.float32) * 1e300, "layer0.weight.* exceeds .*float64"),
        (lambda c: (1e6 * c).to(torch.half), "layer0.weight.* exceeds .*multiply it by less"),
        (lambda c: c + c.submatrix(["layer2.weight"]), r"\['layer0', 'layer1'\] differ"),
        (lambda c: c + diagonal(c), "layer0.weight.*aren't over the same"),
        (lambda c: diagonal(c) + c, "diagonal for 'layer0.weight', the other a KroneckerBlock"),
        (lambda c: c + ungrouped(c), "same groups"),
        (lambda c: c.submatrix(["nose"]), "nose"),
        (lambda c: c.submatrix("layer0.weight"), "list of names"),
        (lambda c: c.submatrix([]), "list of names"),
        (lambda c: c.submatrix(name for name in ["layer2.weight", "nose"]), "nose"),
        (lambda c: c.submatrix(["layer2.weight"] * 2), r"each once.*not \['layer2.weight'\]"),
        (lambda c: c.inverse(1.0, "pi"), "'pi'.*layer1.weight.*'exact'"),
        (lambda c: c.logdet(-1.0), "damping is -1"),
        (lambda c: c.sqrt(-1.0), "damping is -1"),
        (lambda c: c.sample(0.0), "damping is 0.0.*positive"),
        (lambda c: c.sample(1.0, -1), "n is -1.*whole number"),
        (lambda c: c.sample(1.0, 2.5), "n is 2.5.*whole number"),
        (lambda c: c.inverse(math.inf), "damping is inf.*finite"),
        (lambda c: c.inverse(None), "damping is None"),
        (lambda c: c.inverse("0.1"), "damping is 0.1: it must be a finite scalar"),
        (lambda c: c.inverse(torch.ones(1)), "damping is tensor.*scalar"),
        (lambda c: c.logdet(torch.ones(2)), "damping is tensor.*scalar"),
        (lambda c: c @ torch.zeros(3), r"\[\d+\].*not \[3\]"),
        (lambda c: c @ torch.zeros(2, 2, 2), "matrix"),
    ],
)
def test_what_is_not_defined_is_refused(refused, message):
    curvature, _ = make_curvature(MIXED, 0)
    with pytest.raises(ValueError, match=message):
        refused(curvature)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda c: c @ torch.zeros(c._size(), dtype=torch.complex64), "real, but has dtype"),
        (lambda c: c @ {n: 1j * v for n, v in c.diagonal().items()}, "entry 'layer0.bias' has"),
        (lambda c: c.to(torch.int64), "floating-point, not torch.int64"),
        (lambda c: c.to(dtype=torch.complex64), "floating-point, not torch.complex64"),
    ],
)
def test_numbers_that_are_not_real_are_refused_not_cut_off(refused, message):
    curvature, _ = make_curvature(MIXED, 0)
    with pytest.raises(TypeError, match=message):
        refused(curvature)


def test_blocks_say_what_they_are_made_of():
    curvature, _ = make_curvature(MIXED, 0)
    assert curvature.blocks["layer0"].input_factor.ndim == 3
    inverse = curvature.inverse(1.0)
    with pytest.raises(AttributeError, match=r"EigenBlock has no 'input_factor'.*input_vectors"):
        _ = inverse.blocks["layer0"].input_factor
    again = pickle.loads(pickle.dumps(copy.deepcopy(inverse)))
    assert torch.equal(again.to_dense(), inverse.to_dense())


def test_groups_that_share_a_factor_are_saved_and_loaded():
    """As those of an embedding, whose rows have one output factor."""
    layout = Layout("weight", Size([3, 2]), None, 3, transposed=True)
    block = KroneckerBlock(layout, torch.rand(3, 1, 1), torch.rand(1, 2, 2))
    for each in (block, block.eigen(), block.add(block)):
        curvature = kfac_tn.Curvature({"": each}, {"weight": Size([3, 2])})
        loaded = kfac_tn.Curvature.from_state_dict(curvature.state_dict())
        assert torch.equal(loaded.trace(), curvature.trace())


@pytest.mark.parametrize("content", [{"weight": torch.ones(2)}, [torch.ones(2)], torch.ones(2)])
def test_other_files_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(ValueError, match="no state of a Curvature"):
        kfac_tn.Curvature.load(tmp_path / "file.pt")


def broken(kind, change):
    """A state with one thing changed in the block of a kind."""
    curvature, _ = make_curvature(MIXED, 0)
    if kind == "SumBlock":
        curvature = curvature + curvature
    state = copy.deepcopy(curvature.state_dict())
    change(state, next(b for b in state["blocks"].values() if b["kind"] == kind))
    return state


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("DiagonalBlock", lambda s, b: s["blocks"].pop("layer0"), "differ in .*layer0.bias"),
        ("DiagonalBlock", lambda s, b: s["shapes"].pop("layer0.bias"), "differ in .*layer0.bias"),
        ("DiagonalBlock", lambda s, b: s["blocks"].update(other=b), "differ in .*layer2.weight"),
        ("DiagonalBlock", lambda s, b: s["shapes"].update({"layer0.bias": [7]}), r"Size\(\[7\]\)"),
        ("DiagonalBlock", lambda s, b: s["blocks"].update(layer0={}), "kind"),
        ("DiagonalBlock", lambda s, b: s["blocks"].update(layer0=None), "NoneType"),
        ("DiagonalBlock", lambda s, b: s.update(blocks=[]), "list"),
        ("DiagonalBlock", lambda s, b: b.update(kind="DiagonalBlocks"), "DiagonalBlocks"),
        ("DiagonalBlock", lambda s, b: b.update(kind="Layout"), "a Layout lacks"),
        ("DiagonalBlock", lambda s, b: b.update(values=torch.ones(3)), r"Size\(\[3\]\)"),
        ("DiagonalBlock", lambda s, b: b.update(values=None), "NoneType"),
        ("DiagonalBlock", lambda s, b: b.update(scale=1), "scale"),
        ("KroneckerBlock", lambda s, b: b.pop("input_factor"), "lacks .'input_factor'"),
        ("KroneckerBlock", lambda s, b: b.pop("bias"), "lacks .'bias'"),
        ("KroneckerBlock", lambda s, b: b.update(bias="separate"), r"\(2, 3, 3\).*\(2, 2, 2\)"),
        ("KroneckerBlock", lambda s, b: b.update(input_factor=torch.ones(2, 4, 4)), "2, 4, 4"),
        (
            "KroneckerBlock",
            lambda s, b: b.update(
                input_factor=torch.ones(1, 3, 3), grad_output_factor=torch.ones(1, 2, 2)
            ),
            "1, 3, 3",
        ),
        ("KroneckerBlock", lambda s, b: b.update(grad_output_factor=torch.ones(2, 2)), "2, 2"),
        ("KroneckerBlock", lambda s, b: b["layout"].update(groups=0), "ZeroDivisionError"),
        ("KroneckerBlock", lambda s, b: b["layout"].update(groups=3), "groups"),
        ("KroneckerBlock", lambda s, b: b["layout"].pop("transposed"), "lacks .'transposed'"),
        ("EigenBlock", lambda s, b: b.update(values=torch.ones(1, 1, 1)), "1, 1, 1"),
        ("SumBlock", lambda s, b: b.update(terms=[]), "terms"),
        ("SumBlock", lambda s, b: b["terms"].pop(0) and b["terms"][0].pop("bias"), "lacks"),
        ("SumBlock", lambda s, b: b["terms"][0]["layout"].update(bias_name=None), "tensors over"),
        ("SumBlock", lambda s, b: b["terms"][0]["layout"].update(weight_name="w"), "terms of a"),
    ],
)
def test_broken_states_are_refused(kind, change, message):
    with pytest.raises(ValueError, match=f"no state of a Curvature.*{message}"):
        kfac_tn.Curvature.from_state_dict(broken(kind, change))


def test_a_parameter_without_axes():
    """Flat vectors, matrices and samples of models with a scalar."""
    blocks = {
        "scale": DiagonalBlock("scale", torch.tensor(2.0).double()),
        "shift": DiagonalBlock("shift", torch.tensor([3.0, 4.0]).double()),
    }
    shapes = {name: block.values.shape for name, block in blocks.items()}
    curvature = kfac_tn.Curvature(blocks, shapes)
    dense = torch.tensor([2.0, 3.0, 4.0]).double().diag()
    torch.testing.assert_close(curvature.to_dense(), dense)
    torch.testing.assert_close(curvature @ torch.ones(3).double(), dense.sum(1))
    torch.testing.assert_close(curvature @ dense, dense @ dense)
    inverse = curvature.inverse(1.0)
    torch.testing.assert_close(inverse.to_dense(), (dense + torch.eye(3)).inverse())
    assert {name: s.shape for name, s in curvature.sample(1.0).items()} == shapes
    assert curvature.sample(1.0, 5)["scale"].shape == (5,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_decomposed_in_float32(dtype):
    curvature, dense = make_curvature(MIXED, 0)
    half = curvature.to(dtype)
    actual = half.inverse(1.0) @ torch.ones(len(dense))
    assert actual.dtype == dtype
    expected = (dense + torch.eye(len(dense)).double()).inverse().sum(1)
    assert (actual.double() - expected).norm() < 0.05 * expected.norm()
    assert half.eigenvalues().dtype == dtype
    assert all(sample.dtype == dtype for sample in half.sample(1.0, 2).values())


def diagonal(curvature):
    """Another curvature over the same parameters, whose first block is a diagonal."""
    blocks = {**curvature.blocks, "layer0": DiagonalBlock("layer0.weight", torch.rand(4, 2))}
    return kfac_tn.Curvature(blocks, curvature.shapes)


def ungrouped(curvature):
    layout = Layout("layer0.weight", Size((4, 2)), "layer0.bias")
    block = KroneckerBlock(layout, factor(1, 3, 3), factor(1, 4, 4), "joint")
    return kfac_tn.Curvature({**curvature.blocks, "layer0": block}, curvature.shapes)


def test_only_curvatures_are_added():
    curvature, _ = make_curvature(MIXED, 0)
    with pytest.raises(TypeError):
        curvature + 1.0


def test_columns_of_a_dict_must_agree():
    curvature, _ = make_curvature(MIXED, 0)
    v = {name: torch.zeros(*shape, 2).double() for name, shape in curvature.shapes.items()}
    assert all(entry.shape[-1] == 2 for entry in (curvature @ v).values())
    v["layer2.weight"] = v["layer2.weight"][..., 0]
    with pytest.raises(ValueError, match="one more axis of columns"):
        curvature @ v
