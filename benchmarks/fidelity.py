"""Agreement of every estimator with real leave-one-out retraining in float64, on networks with smooth activations.

python benchmarks/fidelity.py                       # everything
python benchmarks/fidelity.py mlp gpt2 --lr 1e-3    # part of it
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path

import pandas as pd
from measure import ESTIMATORS, agreement_row, picked, quiet, scores, show, trained, true_effects
from workloads import WORKLOADS

BETAS = [(0.9, 0.999), (0.9, 0.95)]


def study(
    name: str, lr: float, betas: tuple[float, float], counterfactual: str, removals: int, moments: str = "full"
) -> list[dict[str, object]]:
    workload = WORKLOADS[name]
    settings = {"lr": lr, "betas": betas}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder)
        module = trained(workload, log, **settings, snapshot_moments=moments)
        chosen = picked(removals, workload.n_train)
        truth = true_effects(workload, log, chosen, counterfactual=counterfactual, **settings)
        rows = []
        for estimator, options in ESTIMATORS.items():
            report = scores(workload, log, module, counterfactual=counterfactual, **options)
            found = report.scores[[report.sample_ids.tolist().index(z) for z in chosen]]
            run = {"network": name, "lr": lr, "beta2": betas[1], "removal": counterfactual, "estimator": estimator}
            rows.append({**run, **agreement_row(found, truth)})
    return rows


def main() -> None:
    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(WORKLOADS), metavar="network", help=", ".join(WORKLOADS))
    parser.add_argument("--lr", type=float, nargs="*", default=[1e-3, 1e-4, 1e-5])
    parser.add_argument("--beta2", type=float, nargs="*", default=[b for _, b in BETAS])
    parser.add_argument("--removal", nargs="*", default=["drop", "zero"])
    parser.add_argument("--removals", type=int, default=40)
    parser.add_argument("--snapshot-moments", default="full", help="bfloat16: rounded in the log")
    parser.add_argument("--csv", type=Path, help="also write the table there")
    args = parser.parse_args()
    every = []
    for name, lr, beta2, removal in itertools.product(args.networks, args.lr, args.beta2, args.removal):
        rows = study(name, lr, (0.9, beta2), removal, args.removals, args.snapshot_moments)
        show(rows)
        every += rows
        if args.csv:
            pd.DataFrame(every).to_csv(args.csv, index=False)


if __name__ == "__main__":
    main()
