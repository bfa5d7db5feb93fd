"""What the manipulations derive, in two dimensions, is what the paper writes (arXiv 2307.02275)."""

import pytest

from kfac_tn import tn

X, W, G, PIS = "n c i1 i2", "d c k1 k2", "n d o1 o2", "i1 o1 k1, i2 o2 k2"
EQUATIONS = {
    tn.forward: f"{X}, {PIS}, {W} -> {G}",
    tn.unfold_input: f"{X}, {PIS} -> n c k1 k2 o1 o2",
    tn.unfold_kernel: f"{PIS}, {W} -> d o1 o2 c i1 i2",
    tn.fold_output: f"{PIS}, n c k1 k2 o1 o2 -> {X}",
    tn.weight_vjp: f"{X}, {PIS}, {G} -> {W}",
    tn.input_vjp: f"{W}, {PIS}, {G} -> {X}",
    tn.weight_jvp: f"{X}, {PIS}, {W} -> {G}",
    tn.input_jvp: f"{X}, {PIS}, {W} -> {G}",
    tn.per_example_weight_vjp: f"{X}, {PIS}, {G} -> n {W}",
    tn.kfac_expand_input_factor: (
        f"{X}, {PIS}, n c' i1' i2', i1' o1 k1', i2' o2 k2' -> c k1 k2 c' k1' k2'"
    ),
    tn.kfac_reduce_input_factor: (
        f"{X}, {PIS}, n c' i1' i2', i1' o1' k1', i2' o2' k2' -> c k1 k2 c' k1' k2'"
    ),
    tn.kfac_expand_grad_output_factor: f"{G}, n d' o1 o2 -> d d'",
    tn.kfac_reduce_grad_output_factor: f"{G}, n d' o1' o2' -> d d'",
    tn.ggn_diagonal: (
        f"{X}, {PIS}, v {G}, n c i1' i2', i1' o1' k1, i2' o2' k2, v n d o1' o2' -> {W}"
    ),
    tn.ggn_gram: (
        f"{X}, {PIS}, v {G}, n' c i1' i2', i1' o1' k1, i2' o2' k2, v' n' d o1' o2' -> v n v' n'"
    ),
    tn.ggn_block: (
        f"{X}, {PIS}, v {G}, n c' i1' i2', i1' o1' k1', i2' o2' k2', v n d' o1' o2'"
        f" -> {W} d' c' k1' k2'"
    ),
    tn.hbp_backward: (
        f"{W}, {PIS}, d' c' k1' k2', i1' o1' k1', i2' o2' k2', n d o1 o2 d' o1' o2'"
        " -> n c i1 i2 c' i1' i2'"
    ),
    tn.kfra_backward: (
        f"{W}, {PIS}, d' c' k1' k2', i1' o1' k1', i2' o2' k2', d o1 o2 d' o1' o2'"
        " -> c i1 i2 c' i1' i2'"
    ),
    tn.hessian_diagonal_backward: f"{W}, {PIS}, d c k1' k2', i1 o1 k1', i2 o2 k2', {G} -> {X}",
    tn.hessian_diagonal_weight: f"{X}, {PIS}, n c i1' i2', i1' o1 k1, i2' o2 k2, {G} -> {W}",
    tn.randomized_weight_vjp: f"{X}, {PIS}, {G}, c -> {W}",
    tn.randomized_input_vjp: f"{W}, {PIS}, {G}, d -> {X}",
}


@pytest.mark.parametrize("builder", EQUATIONS, ids=lambda builder: builder.__name__)
def test_derived_equation(builder):
    """One group, whose index the paper leaves out; scalars and their scale aside."""
    network = builder(tn.ConvSpec((2, 3, 6, 5), (4, 3, 3, 2)))
    terms = []
    for node in network.nodes:
        if not isinstance(node.symbol, tn.Scalar | tn.Delta):
            order = (
                (2, 1, 0) if isinstance(node.symbol, tn.IndexPattern) else range(len(node.indices))
            )
            indices = (node.indices[at] for at in order)
            terms.append(" ".join(index for index in indices if index.strip("'") != "g"))
    result = " ".join(index for index in network.output_indices if index.strip("'") != "g")
    left, right = EQUATIONS[builder].split(" -> ")
    assert (sorted(terms), result) == (sorted(left.split(", ")), right)
