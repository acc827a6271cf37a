"""The paper's four settings: every estimator, the ceiling, and the error proxy, over learning rates and seeds.

    python benchmarks/settings.py mlp --activation gelu     # 784-16-16-10 on MNIST images; also relu, as published
    python benchmarks/settings.py cnn
    python benchmarks/settings.py gpt2                      # continued training on text, after a short pretraining
    python benchmarks/settings.py llama                     # LoRA on a Llama architecture

Prints a table, mean and spread over seeds, and writes every run, as soon as it is done, and a figure to ``--out``. GPT-2 and Llama are small here:
``--layers`` and ``--width`` set their size.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch
from matplotlib.figure import Figure
from measure import ESTIMATORS, quiet
from peft import LoraConfig, get_peft_model
from scipy.stats import spearmanr
from torch import nn
from torch.utils.data import DataLoader, Subset
from workloads import WORKLOADS, Text, Workload, gpt2, llama

from lightning_influence import InfluenceCallback, check_faithfulness, error_proxy
from lightning_influence.log.steps import LoggedSteps
from lightning_influence.trust.faithfulness import CEILING

SETTINGS = {
    "mlp": WORKLOADS["mlp"],
    "cnn": WORKLOADS["cnn"],
    "gpt2": WORKLOADS["gpt2"],
    "llama": WORKLOADS["instructions"],
}
RATES = (1e-3, 1e-4, 1e-5)
CHECKED = {
    k: ESTIMATORS[k] for k in ("SGD-influence", "paper: tangent + Fisher", "finite + Fisher", "finite + Hessian")
}
AVAILABLE = {"mlp": 4984, "cnn": 1781, "gpt2": 1984, "llama": 10487}
"""Samples beside the queries (of text, and what the pretraining reads): the batches of longer runs are smaller."""
FIRST_ORDER = "metagradient: tangent + Hessian"


def network(setting: str, args: argparse.Namespace, seed: int) -> tuple[Workload, Callable[[], nn.Module]]:
    """The workload, and its network at the start of the recorded run."""
    torch.manual_seed(seed)
    if setting == "mlp":
        act = {"relu": nn.ReLU, "gelu": nn.GELU}[args.activation]
        net = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), act(), nn.Linear(16, 16), act(), nn.Linear(16, 10))
    elif setting == "cnn":
        net = WORKLOADS["cnn"].build()
    else:
        net = pretrained((gpt2 if setting == "gpt2" else llama)(args.layers, args.width), args.pretraining)
        if setting == "llama":
            net = get_peft_model(net, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    state = {k: v.clone() for k, v in net.state_dict().items()}

    def again() -> nn.Module:
        net.load_state_dict(state)
        return net

    workload = SETTINGS[setting]
    batch = min(workload.batch, AVAILABLE[setting] // args.steps)
    return replace(workload, n_train=args.steps * batch, batch=batch), again


def pretrained(net: nn.Module, steps: int) -> nn.Module:
    """Some steps on blocks of text of their own."""
    data = WORKLOADS["gpt2"].data()
    loader = DataLoader(Subset(data, range(2000, len(data))), 16, shuffle=True)  # type: ignore[arg-type]
    module = Text(lambda: net, 2e-3, (0.9, 0.999))
    settings = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    L.Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", **settings).fit(module, loader)
    return net


def one(setting: str, args: argparse.Namespace, lr: float, seed: int) -> dict[str, float]:
    """Spearman correlation of each estimator with retraining, the ceiling, and the proxy's with the true error."""
    workload, build = network(setting, args, seed)
    kind = workload.module
    module = kind(lambda: copy.deepcopy(build()), lr, (0.9, 0.95) if setting == "mlp" else (0.9, 0.999))
    train, queries = workload.split()
    with tempfile.TemporaryDirectory() as folder:
        workload.fit(module, InfluenceCallback(folder, record="replay", existing="overwrite"))
        asked = list(DataLoader(queries, workload.n_queries))
        options: dict[str, Any] = {"model": module, "data": train, "queries": asked, "target": "mean"}
        check = check_faithfulness(
            folder,
            removals=args.removals,
            subsets=args.subsets,
            estimators={**CHECKED, FIRST_ORDER: ESTIMATORS[FIRST_ORDER]},
            query_loss=kind.each_loss,
            progress=False,
            **options,
        )
        found = {name: check.single[name].spearman.value for name in CHECKED}
        found[CEILING] = check.single[CEILING].spearman.value
        found |= {f"LDS, {name}": agreement.spearman.value for name, agreement in check.subsets.items()}
        found["error, finite + Hessian"] = check.single["finite + Hessian"].relative_error.value
        if args.proxies:
            steps = {z: t for t, z in rows_of(folder)}
            some = list(check.removals[: args.proxies])
            pairs = [(z, steps[z]) for z in some]
            proxy = error_proxy(folder, pairs=pairs, query_loss=kind.each_loss, progress=False, **options).proxies[1.0]
            missed = (check.truth - check.scores[FIRST_ORDER].double())[: len(some), 0]
            predicted, truth = proxy.total[:, 0], check.truth[: len(some), 0]
            found["proxy with true error"] = float(spearmanr(predicted, missed).statistic)
            found["proxy / true error"] = float(predicted.norm() / missed.norm())
            second = proxy.second_order[:, 0]
            found["second variation alone with true error"] = float(spearmanr(second, missed).statistic)
            found["second variation alone / true error"] = float(second.norm() / missed.norm())
            found["corrected"] = float(spearmanr(proxy.corrected[:, 0], truth).statistic)
            found["error, corrected"] = float((proxy.corrected[:, 0] - truth).norm() / truth.norm())
    return found


def rows_of(log: str) -> list[tuple[int, int]]:
    steps = LoggedSteps(log)
    return [(t, int(z)) for t in range(len(steps)) for z in steps.record(t).sample_ids]


def main() -> None:
    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=list(SETTINGS))
    parser.add_argument("--activation", choices=["gelu", "relu"], default="gelu")
    parser.add_argument("--lr", type=float, nargs="*", default=RATES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--removals", type=int, default=30)
    parser.add_argument(
        "--subsets", type=int, default=0, help="random tenths removed, for the linear datamodeling score"
    )
    parser.add_argument("--proxies", type=int, default=12, help="removals whose error is predicted; 0 for none")
    parser.add_argument("--steps", type=int, default=64, help="of the recorded run; batches shrink where data run out")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--pretraining", type=int, default=200, help="steps before the recorded run")
    parser.add_argument("--out", type=Path, default=Path("runs/settings"))
    args = parser.parse_args()
    name = f"{args.setting}-{args.activation}" if args.setting == "mlp" else args.setting
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for lr in args.lr:
        for seed in range(args.seeds):
            rows.append({"lr": lr, "seed": seed, **one(args.setting, args, lr, seed)})
            pd.DataFrame(rows).to_csv(args.out / f"{name}.csv", index=False)
    table = pd.DataFrame(rows).drop(columns="seed").groupby("lr", sort=False)
    print(
        f"{name}: {args.steps} steps, {args.removals} removals, {args.seeds} seeds; Spearman with retraining, mean and spread"
    )
    mean, spread = table.mean(), table.std()
    print(mean.T.to_string(float_format=lambda v: f"{v:.3f}"))
    if args.seeds > 1:
        print("spread\n" + spread.T.to_string(float_format=lambda v: f"{v:.3f}"), flush=True)
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    mean[[*CHECKED, CEILING]].plot.bar(ax=axes, yerr=spread[[*CHECKED, CEILING]] if args.seeds > 1 else None, width=0.8)
    axes.set(ylabel="Spearman with retraining", xlabel="learning rate", title=name)
    figure.savefig(args.out / f"{name}.png", dpi=150)
    print(f"wrote {args.out / name}.csv and .png")


if __name__ == "__main__":
    main()
