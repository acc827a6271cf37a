"""What masks cost: scores of the same run from logs that keep fewer coordinates of every parameter.

    python benchmarks/compression.py mlp cnn gpt2 llama --lr 1e-4

Spearman correlation with leave-one-out retraining, and with the scores of the whole log; size of the log.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from measure import agreement_row, picked, quiet, scores, show, true_effects
from workloads import WORKLOADS

from lightning_influence import InfluenceCallback

FORMS = {
    "every coordinate": {"compression": "factored"},
    "mask 8192": {"compression": "mask", "mask_size": 8192},
    "mask 2048": {"compression": "mask", "mask_size": 2048},
    "mask 512": {"compression": "mask", "mask_size": 512},
    "mask 128": {"compression": "mask", "mask_size": 128},
}


def main() -> None:
    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="+", choices=list(WORKLOADS))
    parser.add_argument("--lr", type=float, nargs="*", default=[1e-4])
    parser.add_argument("--removals", type=int, default=30)
    args = parser.parse_args()
    rows = []
    for name in args.workloads:
        workload = WORKLOADS[name]
        chosen = picked(args.removals, workload.n_train)
        for lr in args.lr:
            truth = whole = None
            for form, options in FORMS.items():
                with tempfile.TemporaryDirectory() as folder:
                    log, module = Path(folder) / "log", workload.make(lr)
                    workload.fit(module, InfluenceCallback(log, record="gradients", **options))  # type: ignore[arg-type]
                    if truth is None:
                        truth = true_effects(workload, log, chosen, counterfactual="drop", lr=lr)
                    found = scores(workload, log, module, response="tangent", curvature="fisher").scores
                    size = sum(f.stat().st_size for f in log.rglob("*") if f.is_file())
                whole = found if whole is None else whole
                rows.append(
                    {
                        "network": name,
                        "lr": lr,
                        "kept": form,
                        "with retraining": agreement_row(found[chosen], truth)["Spearman"],
                        "with every coordinate": agreement_row(found, whole)["Spearman"],
                        "log MB": size / 1e6,
                    }
                )
    show(rows, 3)


if __name__ == "__main__":
    main()
