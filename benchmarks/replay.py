"""What exact attribution by replay costs, beside plain training in the same process, and what it is worth.

python benchmarks/replay.py [network ...]        # cost and fidelity of each estimator, one target
python benchmarks/replay.py mlp --growth         # with the number of steps, samples, queries and snapshots
python benchmarks/replay.py gpt2 --memory        # run forward and walked back, within less and less memory
python benchmarks/replay.py gpt2 --processes     # two processes of one thread beside one
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning import Fabric
from measure import ESTIMATORS, agreement_row, picked, quiet, scores, show, timed, trained, true_effects
from torch.utils.data import DataLoader
from workloads import WORKLOADS, Workload, gpt2

from lightning_influence.core.sweep import Method, sweep
from lightning_influence.scoring.attribution import open_trajectory
from lightning_influence.scoring.queries import query_gradients

LARGER: dict[str, Any] = {"gpt2": {"build": partial(gpt2, 2, 256)}}
SETTINGS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999)}


def cost(workload: Workload, removals: int) -> None:
    """Seconds of every estimator and its agreement with retraining."""
    seconds: dict[str, float] = {}
    workload.fit(workload.make(**SETTINGS))  # warm up
    with timed(seconds, "plain"):
        workload.fit(workload.make(**SETTINGS))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder)
        with timed(seconds, "recorded"):
            module = trained(workload, log, **SETTINGS)
        size = sum(f.stat().st_size for f in log.rglob("*") if f.is_file())
        chosen = picked(removals, workload.n_train)
        truth = true_effects(workload, log, chosen, counterfactual="drop", **SETTINGS).mean(1, keepdim=True)
        rows = []
        for name, options in {**ESTIMATORS, "finite + Hessian, window 0": {"memory_window": 0}}.items():
            with timed(seconds, name):
                report = scores(workload, log, module, target="mean", **options)
            found = report.scores[[report.sample_ids.tolist().index(z) for z in chosen]]
            agreement = agreement_row(found, truth)
            rows.append(
                {
                    "estimator": name,
                    "seconds": seconds[name],
                    "times plain": seconds[name] / seconds["plain"],
                    "Spearman": agreement["Spearman"],
                    "error": agreement["error"],
                }
            )
    steps = len(workload.loader())
    print(
        f"{workload.name}: {steps} steps; plain {seconds['plain']:.2f} s, recorded for replay {seconds['recorded']:.2f} s "
        f"({seconds['recorded'] / seconds['plain']:.2f} times), log {size / 1e6:.1f} MB"
    )
    show(rows, 3)


def growth(workload: Workload) -> None:
    """Seconds, log size and peak memory as one number changes."""
    base = replace(workload, n_train=workload.batch * 16)
    cases: dict[str, tuple[Workload, dict[str, Any]]] = {"16 steps": (base, {})}
    for steps in (32, 64):
        cases[f"{steps} steps"] = (replace(base, n_train=workload.batch * steps), {})
    for batch in (2, 4):
        bigger = replace(base, batch=base.batch * batch, n_train=base.n_train * batch)
        cases[f"16 steps, {batch} times the samples"] = (bigger, {})
    for queries in (4, 16):
        cases[f"16 steps, {queries} queries"] = (replace(base, n_queries=queries), {"target": None})
    for every in (1, 4, 16, 64):
        case = replace(base, n_train=workload.batch * 64)
        cases[f"64 steps, snapshot_every={every}"] = (case, {"snapshot_every": every})
    rows = []
    for name, (case, options) in cases.items():
        seconds: dict[str, float] = {}
        record = {k: v for k, v in options.items() if k == "snapshot_every"}
        with tempfile.TemporaryDirectory() as folder:
            module = trained(case, Path(folder), **SETTINGS, **record)
            size = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
            with timed(seconds, "attribute"):
                scores(case, Path(folder), module, target=options.get("target", "mean"))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows.append({"run": name, "seconds": seconds["attribute"], "log MB": size / 1e6, "peak MB so far": peak})
    print(workload.name)
    show(rows, 2)


def memory(workload: Workload) -> None:
    """Seconds, evaluations of a step, and what the scores lose, as less is held: 64 steps, a snapshot every 16."""
    case = replace(workload, n_train=workload.batch * 64)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        module = trained(case, Path(folder), **SETTINGS, snapshot_every=16)
        queries = DataLoader(case.split()[1], case.n_queries)
        with open_trajectory(folder, module, "hessian", progress=False) as run:
            gradients = query_gradients(module, queries, list(run.sizes), run.select, target="mean", progress=False)
        copy = sum(g.numel() * g.element_size() for g in gradients.values())  # of the parameters
        whole = None
        for held, walks in ((None, False), (40, True), (40, False), (20, False), (4, True), (4, False)):
            seconds: dict[str, float] = {}
            with open_trajectory(folder, module, "hessian", progress=False) as run:
                if held is not None:
                    run.states.memory = run.states.least() + held * copy
                run.states.walks = walks
                with timed(seconds, "sweep"):
                    scores = sweep(run, gradients, Method("hessian", "tangent"), progress=False).scores
                whole = scores if whole is None else whole
                row = {"held": "everything" if held is None else f"{held} copies", "walks back": walks}
                row |= {"seconds": seconds["sweep"], "evaluations": run.states.evaluated}
                row |= {"score error": float((scores - whole).norm() / whole.norm()), "drift": max(run.drift.values())}
                rows.append(row)
    print(f"{workload.name}: {copy / 2**20:.1f} MB of parameters")
    print(pd.DataFrame(rows).to_string(index=False, float_format=lambda v: f"{v:.3g}"), flush=True)


def processes(workload: Workload) -> None:
    """Seconds of one process and of two that share its replay, one after the other; six steps, a gigabyte each."""
    with tempfile.TemporaryDirectory() as folder:
        module = trained(workload, Path(folder), **SETTINGS)
        torch.save(module.state_dict(), Path(folder) / "trained.pt")
        Fabric(accelerator="cpu", devices=2, strategy="ddp_spawn").launch(
            partial(_side_by_side, workload=workload, log=Path(folder))
        )


def _side_by_side(fabric: Any, workload: Workload, log: Path) -> None:
    quiet()
    torch.set_num_threads(1)
    module = workload.make(**SETTINGS)
    module.load_state_dict(torch.load(log / "trained.pt"))
    rows: list[dict[str, Any]] = []
    columns: dict[int, torch.Tensor] = {}
    for response in ("tangent", "finite"):
        for count in (1, 2):
            fabric.barrier()
            if count == 1 and fabric.global_rank > 0:
                continue
            seconds, processor = time.perf_counter(), time.process_time()
            shared = fabric if count == 2 else None
            report = scores(workload, log, module, target="mean", response=response, fabric=shared, max_memory=2**30)
            row = {"response": response, "processes": count, "s": time.perf_counter() - seconds}
            rows.append(row | {"CPU s of the first": time.process_time() - processor})
            columns[count] = report.scores
        if fabric.global_rank == 0:
            rows[-1]["difference"] = float((columns[2] - columns[1]).abs().max() / columns[1].abs().max())
    if fabric.global_rank == 0:
        print(pd.DataFrame(rows).to_string(index=False, float_format=lambda v: f"{v:.3g}"), flush=True)


def main() -> None:
    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(WORKLOADS), metavar="network", help=", ".join(WORKLOADS))
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--processes", action="store_true")
    parser.add_argument("--removals", type=int, default=20)
    args = parser.parse_args()
    for name in args.networks:
        if args.memory:
            memory(WORKLOADS[name])
        elif args.processes:
            processes(replace(WORKLOADS[name], n_train=6 * WORKLOADS[name].batch, **LARGER.get(name, {})))
        elif args.growth:
            growth(WORKLOADS[name])
        else:
            cost(WORKLOADS[name], args.removals)


if __name__ == "__main__":
    main()
