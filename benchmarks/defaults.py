"""What each default of KFAC is worth: one hyper-parameter changed at a time.

    python benchmarks/defaults.py        # about 10 minutes; writes benchmarks/results/defaults.md

All variants of a problem train for the same seconds, in alternating slices of half a second, as in
the main example; Adam's best of three learning rates stands beside them. The numbers are training
losses at the end, relative to the defaults' (above 1: the default is better).
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfac_tn
from kfac_tn.optim import Adaptive
from kfac_tn.optim.step_rules import Proposal

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import compare_optimizers  # noqa: E402
from compare_optimizers import Run, compete, describe_machine  # noqa: E402
from problems import Images, Problem, autoencoder, classifier, load_images  # noqa: E402


class Falling(Adaptive):
    """Takes less of alpha the longer training goes on: what a schedule would be worth."""

    def scale(self, proposal: Proposal) -> Tensor:  # noqa: D102
        self.share = 1 / (1 + proposal.estimator.steps / 100)
        return super().scale(proposal)


VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "step_rule='graft'": {"step_rule": "graft"},
    "step_rule='graft', betas=(0.9, 0.99)": {"step_rule": "graft", "betas": (0.9, 0.99)},
    "Adaptive(spread=0)": {"step_rule": partial(Adaptive, spread=0.0)},
    "Adaptive(spread=1)": {"step_rule": partial(Adaptive, spread=1.0)},
    "Adaptive(radius=2)": {"step_rule": partial(Adaptive, radius=2.0)},
    "Adaptive(radius=8)": {"step_rule": partial(Adaptive, radius=8.0)},
    "Adaptive(share=0.5)": {"step_rule": partial(Adaptive, share=0.5)},
    "Adaptive(share=2)": {"step_rule": partial(Adaptive, share=2.0)},
    "Adaptive(share=4)": {"step_rule": partial(Adaptive, share=4.0)},
    "Adaptive(horizon=0)": {"step_rule": partial(Adaptive, horizon=0.0)},
    "Adaptive(horizon=0.1)": {"step_rule": partial(Adaptive, horizon=0.1)},
    "Adaptive(horizon=0.4)": {"step_rule": partial(Adaptive, horizon=0.4)},
    "Adaptive, share falling as 1 / (1 + step / 100)": {"step_rule": Falling},
    "Adaptive(share=0.5, radius=2, fresh=0)": {
        "step_rule": partial(Adaptive, share=0.5, radius=2.0, fresh=0.0)
    },
    "Adaptive(interval=10)": {"step_rule": partial(Adaptive, interval=10)},
    "Adaptive(fresh=0)": {"step_rule": partial(Adaptive, fresh=0.0)},
    "Adaptive(fresh=0.1)": {"step_rule": partial(Adaptive, fresh=0.1)},
    "Adaptive(fresh=0.3)": {"step_rule": partial(Adaptive, fresh=0.3)},
    "lr=3e-3": {"lr": 3e-3},
    "lr=2e-2": {"lr": 2e-2},
    "betas=(0.9, 0.99)": {"betas": (0.9, 0.99)},
    "betas=(0.9, 0.999)": {"betas": (0.9, 0.999)},
    "approximation='reduce'": {"approximation": "reduce"},
    "curvature='ekfac'": {"curvature": "ekfac"},
    "curvature='diagonal'": {"curvature": "diagonal"},
    "ekfac, factor_interval=5": {"curvature": "ekfac", "factor_interval": 5},
    "ekfac, inverse_interval=500": {"curvature": "ekfac", "inverse_interval": 500},
    "damping_split='exact'": {"damping_split": "exact"},
    "max_dim=64, blocks": {"max_dim": 64, "large_factors": "blocks"},
    "max_dim=64": {"max_dim": 64},
    "max_dim=64, diagonal": {"max_dim": 64, "large_factors": "diagonal"},
    "fisher='empirical'": {"fisher": "empirical"},
    "fisher='forward-only'": {"fisher": "forward-only"},
    "mc_samples=1": {"mc_samples": 1},
    "mc_samples=4": {"mc_samples": 4},
    "damping=1e-2": {"damping": 1e-2},
    "damping=1e-4": {"damping": 1e-4},
    "relative_damping=False": {"relative_damping": False},
    "noise_damping=0": {"noise_damping": 0.0},
    "noise_damping=1": {"noise_damping": 1.0},
    "noise_damping=100": {"noise_damping": 100.0},
    "factor_decay=0.5": {"factor_decay": 0.5},
    "factor_decay=0.98": {"factor_decay": 0.98},
    "factor_interval=20": {"factor_interval": 20},
    "factor_interval=100": {"factor_interval": 100},
    "inverse_interval=20": {"inverse_interval": 20},
    "inverse_interval=500": {"inverse_interval": 500},
    "step_rule='kl_clip', lr=0.1": {"step_rule": "kl_clip", "lr": 0.1},
    "step_rule='fixed', lr=0.1": {"step_rule": "fixed", "lr": 0.1},
}


def regression() -> Problem:
    """A smooth function with high frequencies, where first-order methods get stuck."""
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(6144, 2, generator=generator) - 1
    y = torch.sin(6 * x[:, :1]) * torch.cos(9 * x[:, 1:])

    def build() -> nn.Module:
        widths = [nn.Linear(2, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh()]
        return nn.Sequential(*widths, nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 1))

    return Problem(
        title="Regression of sin(6x) cos(9y), squared error",
        build=build,
        loss=nn.MSELoss,
        train=(x[:4096], y[:4096]),
        test=(x[4096:], y[4096:]),
        metric="test loss",
        measure=F.mse_loss,
        learning_rates={"Adam": (1e-3, 3e-3, 1e-2)},
    )


def normalized_classifier(images: Images) -> Problem:
    """The classifier with group normalization: parameters without Kronecker structure."""
    plain = classifier(images, "digits")

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for layer in plain.build().children():
            layers.append(layer)
            if isinstance(layer, nn.Conv2d):
                layers.append(nn.GroupNorm(8, layer.out_channels))
        return nn.Sequential(*layers)

    return Problem(
        title="CNN classifier with GroupNorm on digits, cross-entropy",
        build=build,
        loss=plain.loss,
        train=plain.train,
        test=plain.test,
        metric=plain.metric,
        measure=plain.measure,
        learning_rates={"Adam": (3e-3, 1e-2, 3e-2)},
    )


def make(options: dict[str, Any]) -> Any:
    """A factory of the kind that the example's runs expect."""
    return lambda model, loss_fn, lr: kfac_tn.KFAC(
        model, loss_fn, **{n: v() if callable(v) else v for n, v in options.items()}
    )


def main() -> None:
    """Compete, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="for each run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[""], help="variants with one of these words")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    import training_problems  # which imports this module

    torch.set_num_threads(options.threads)
    variants = [
        name
        for name in VARIANTS
        if name == "defaults" or any(word in name for word in options.only)
    ]
    compare_optimizers.OPTIMIZERS.update({name: make(VARIANTS[name]) for name in variants})
    images = load_images("digits")
    problems = [
        classifier(images, "digits"),
        normalized_classifier(images),
        autoencoder(images, "digits"),
        regression(),
        training_problems.curves_autoencoder(),
        training_problems.tabular(),
    ]
    columns: dict[str, dict[str, float]] = {}
    for problem in problems:
        runs = [Run(problem, name, None, 256, seed=0) for name in variants]
        runs += [Run(problem, "Adam", lr, 256, seed=0) for lr in problem.learning_rates["Adam"]]
        compete(runs, options.seconds)
        losses = {run.name: run.final_loss for run in runs if run.lr is None}
        losses["best Adam"] = min(run.final_loss for run in runs if run.lr is not None)
        columns[problem.title] = losses
        print(problem.title, losses, flush=True)
    setting = (
        f"Training loss after {options.seconds:g} s, batches of 256, seed 0; first line: itself, "
        f"then relative to it; {describe_machine()}."
    )
    lines = [["", *columns], ["---", *["---:"] * len(columns)]]
    for name in [*variants, "best Adam"]:
        cells = [
            f"{losses[name]:.2e}"
            if name == "defaults"
            else f"{losses[name] / losses['defaults']:.2f}"
            for losses in columns.values()
        ]
        lines.append([name, *cells])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "defaults.md").write_text(f"# The defaults\n\n{setting}\n\n{table}\n")
    record = {"setting": setting, "losses": columns}
    (options.output / "defaults.json").write_text(json.dumps(record, indent=1))
    print(f"{setting}\n\n{table}")


if __name__ == "__main__":
    main()
