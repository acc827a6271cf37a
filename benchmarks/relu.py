"""Networks with kinks: how far the truth repeats itself, and whether curvature smoothed across the kinks predicts it.

python benchmarks/relu.py                  # MLP 784-16-16-10 as published, float64
python benchmarks/relu.py --lr 1e-4 --seeds 1
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from typing import Any

import lightning as L
import pandas as pd
import torch
from measure import picked, quiet
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from workloads import WORKLOADS, Images, mnist

from lightning_influence import InfluenceCallback, attribute
from lightning_influence.errors import InfluenceError
from lightning_influence.scoring.queries import query_losses
from lightning_influence.trust.agreement import agreement_of
from lightning_influence.trust.retraining import Run, leave_one_out, moved_initialisation, recorded_run

WORKLOAD = WORKLOADS["mlp"]
MOVES = (1e-3, 1e-4, 1e-5, 1e-6)
WIDTHS = (0.003, 0.01, 0.03)
RUNS = 6  # over which effects and scores are averaged


class SmoothKink(nn.Module):
    """ReLU, and its derivative, but with the second derivative of a kink as wide as ``width`` standard deviations.

    A removal moves activations across the kink, which the derivative at a point does not see; on average over where
    they lie it does what a bump of area 1 does.
    """

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return _Kink.apply(x, self.width * float(x.detach().std()))


class _Kink(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.width = width
        return x.relu()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return _Step.apply(gradient, x, ctx.width), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(gradient, x)
        ctx.width = width
        return gradient * (x > 0)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor, None]:
        gradient, x = ctx.saved_tensors
        bump = torch.exp(-0.5 * (x / ctx.width) ** 2) / (ctx.width * (2 * torch.pi) ** 0.5)
        return outer * (x > 0), outer * gradient * bump, None


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Flatten(), nn.Linear(784, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10)
    return nn.Sequential(*layers).double()


def smoothed(module: Images, width: float) -> Images:
    twin = copy.deepcopy(module)
    for name, layer in twin.net.named_children():
        if isinstance(layer, nn.ReLU):
            setattr(twin.net, name, SmoothKink(width))
    return twin


def record(module: Images, train: Any, log: str) -> None:
    loader = DataLoader(train, WORKLOAD.batch, shuffle=True, generator=torch.Generator().manual_seed(0))
    settings = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    callback = InfluenceCallback(log, record="replay", existing="overwrite")
    L.Trainer(max_epochs=1, accelerator="cpu", logger=False, callbacks=[callback], **settings).fit(module, loader)


def one(lr: float, seed: int, removals: int) -> dict[str, float]:
    data = TensorDataset(*(t.double() if t.is_floating_point() else t for t in mnist().tensors))
    train, asked = Subset(data, range(WORKLOAD.n_train)), Subset(data, range(WORKLOAD.n_train, WORKLOAD.n_train + 16))
    queries = list(DataLoader(asked, 16))
    removed = picked(removals, WORKLOAD.n_train, seed)

    def losses(module: Any) -> Tensor:
        return query_losses(module, queries, Images.each_loss).mean()[None]

    def fresh() -> Images:
        return Images(lambda: network(seed), lr, (0.9, 0.95))

    def estimate(make: Callable[[], Images], width: float | None = None, **options: Any) -> Tensor:
        """Scores ``(removals, 1)``, from a recording of the run that starts at ``make()``."""
        module = make()
        with tempfile.TemporaryDirectory() as log:
            record(module, train, log)
            asks = {"queries": queries, "data": train, "target": "mean", "query_loss": Images.each_loss}
            seen = module if width is None else smoothed(module, width)
            try:
                report = attribute(log, model=seen, progress=False, **asks, **options)
            except InfluenceError:  # scores that overflowed on the way
                return torch.zeros(removals, 1)
        position = {int(z): i for i, z in enumerate(report.sample_ids)}
        return report.scores[[position[z] for z in removed]].double()

    with tempfile.TemporaryDirectory() as log:
        record(fresh(), train, log)
        run = recorded_run(log, fresh, train, dtype=torch.float64)

        def effects(of: Run) -> Tensor:
            return leave_one_out(of, removed, losses, progress=False)

        def spearman(found: Tensor, truth: Tensor) -> float:
            return agreement_of(found, truth, resamples=1).spearman.value

        truth = effects(run)
        found = {
            f"truth moved by {move:g}": spearman(effects(moved_initialisation(run, move)), truth) for move in MOVES
        }
        found["tangent + Hessian"] = spearman(estimate(fresh, response="tangent"), truth)
        found["finite + Hessian"] = spearman(estimate(fresh), truth)
        for width in WIDTHS:
            found[f"finite, kinks {width:g} wide"] = spearman(estimate(fresh, width), truth)
        runs = [moved_initialisation(run, seed=i) for i in range(RUNS)]
        several = torch.stack([effects(r) for r in runs])
        halves = several[: RUNS // 2].mean(0), several[RUNS // 2 :].mean(0)
        found[f"mean truth of {RUNS // 2} runs with that of {RUNS // 2} others"] = spearman(*halves)
        mean = several.mean(0)
        others = [(several.sum(0) - each) / (RUNS - 1) for each in several]
        pairs = zip(several, others, strict=True)
        found[f"truth of one run with mean of {RUNS - 1} others"] = sum(spearman(e, o) for e, o in pairs) / RUNS
        scores = [estimate(r.make_module) for r in runs]
        pairs = zip(scores, others, strict=True)
        found[f"finite + Hessian of one run with mean of {RUNS - 1} others"] = (
            sum(spearman(e, o) for e, o in pairs) / RUNS
        )
        found[f"finite + Hessian, mean of {RUNS} runs, with mean truth"] = spearman(torch.stack(scores).mean(0), mean)
    return found


def main() -> None:
    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, nargs="*", default=[1e-3, 1e-4, 1e-5])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--removals", type=int, default=30)
    args = parser.parse_args()
    rows = [{"lr": lr, **one(lr, seed, args.removals)} for lr in args.lr for seed in range(args.seeds)]
    print(f"Spearman over {args.removals} removals, mean of {args.seeds} seeds")
    print(pd.DataFrame(rows).groupby("lr", sort=False).mean().T.to_string(float_format=lambda v: f"{v:.3f}"))


if __name__ == "__main__":
    main()
