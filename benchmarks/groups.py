"""Groups: the joint response to the removal of a group against the sum of its samples' scores, by retraining in float64.

python benchmarks/groups.py                       # everything
python benchmarks/groups.py mlp gpt2 --lr 1e-3    # part of it
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path

import pandas as pd
import torch
from measure import agreement_row, quiet, scores, show, timed, trained, true_effects
from workloads import WORKLOADS

from lightning_influence.trust.agreement import sums_over


def random_groups(n: int, of: int, size: float) -> dict[str, list[int]]:
    """``n`` random groups of a share ``size`` of the samples."""
    generator = torch.Generator().manual_seed(2)
    drawn = [torch.randperm(of, generator=generator)[: round(size * of)] for _ in range(n)]
    return {f"group {i}": ids.sort().values.tolist() for i, ids in enumerate(drawn)}


def study(name: str, lr: float, n: int, size: float, window: int) -> list[dict[str, object]]:
    workload = WORKLOADS[name]
    groups, seconds = random_groups(n, workload.n_train, size), dict[str, float]()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder)
        module = trained(workload, log, lr=lr)
        with timed(seconds, "retraining"):
            chosen = [frozenset(ids) for ids in groups.values()]
            truth = true_effects(workload, log, chosen, counterfactual="drop", lr=lr)
        with timed(seconds, "samples"):
            alone = scores(workload, log, module, memory_window=window)
        with timed(seconds, "groups"):
            report = scores(workload, log, module, groups=groups, samples=(), memory_window=window)
    assert report.groups is not None
    found = {
        "sum of single scores": sums_over(alone.scores, alone.sample_ids, chosen),
        "joint response": report.groups.scores,
    }
    off = (report.groups.scores - truth).norm(dim=1) / truth.norm(dim=1)
    for bend, error in zip(report.groups.bends or (), off.tolist(), strict=True):
        print(f"{name}, lr {lr:g}: bend {bend:.3f}, error {error:.3f}", flush=True)
    run = {"network": name, "lr": lr}
    rows = [{**run, "prediction": told, **agreement_row(values, truth)} for told, values in found.items()]
    print({what: round(s, 1) for what, s in seconds.items()}, flush=True)
    return rows


def main() -> None:
    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["mlp", "cnn", "gpt2"], metavar="network")
    parser.add_argument("--lr", type=float, nargs="*", default=[1e-4, 1e-3])
    parser.add_argument("--groups", type=int, default=24)
    parser.add_argument("--size", type=float, default=0.1, help="share of the samples in a group")
    parser.add_argument("--window", type=int, default=8, help="memory window of the response")
    parser.add_argument("--csv", type=Path, help="also write the table there")
    args = parser.parse_args()
    every: list[dict[str, object]] = []
    for name, lr in itertools.product(args.networks, args.lr):
        rows = study(name, lr, args.groups, args.size, args.window)
        show(rows)
        every += rows
        if args.csv:
            pd.DataFrame(every).to_csv(args.csv, index=False)


if __name__ == "__main__":
    main()
