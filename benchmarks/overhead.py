"""Time, disk and memory of logging beside plain training: each variant in a process of its own, in turns. Then what the checks of
the first step and of every later one cost, on against off in one run, in processor seconds.

python benchmarks/overhead.py [network ...]
python benchmarks/overhead.py gpt2 --only-checks
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import torch
from measure import quiet, show
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel
from workloads import Images, Text, cnn, mlp

from lightning_influence import InfluenceCallback
from lightning_influence.capture.sums import SumCheck

STEPS, WARM = 14, 4


def gpt2() -> nn.Module:
    config = {"vocab_size": 512, "n_positions": 128, "n_embd": 256, "n_layer": 4, "n_head": 4}
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**config, **rates, bos_token_id=0, eos_token_id=0))


def images(batch: int) -> TensorDataset:
    return TensorDataset(torch.rand(STEPS * batch, 1, 28, 28), torch.randint(10, (STEPS * batch,)))


NETWORKS: dict[str, tuple[Any, Callable[[], nn.Module], Callable[[], TensorDataset], int]] = {
    "mlp 784-256-256-10, batch 64": (Images, mlp(784, 256), lambda: images(64), 64),
    "cnn, batch 64": (
        Images,
        lambda: nn.Sequential(nn.AvgPool2d(3), nn.ZeroPad2d((0, -1, 0, -1)), cnn()),
        lambda: images(64),
        64,
    ),
    "gpt2 4 x 256, batch 8 x 128": (Text, gpt2, lambda: TensorDataset(torch.randint(512, (STEPS * 8, 128))), 8),
}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "auto": {},
    "mask": {"compression": "mask", "record": "gradients"},
    "factored": {"compression": "factored", "record": "gradients"},
    "full": {"compression": "full", "record": "gradients"},
    "replay": {"record": "replay"},
}


class Clock(L.Callback):
    """Seconds from the start of one batch to the start of the next."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.at.append(time.perf_counter())

    @property
    def median(self) -> float:
        return statistics.median(b - a for a, b in zip(self.at[WARM:], self.at[WARM + 1 :], strict=False))


def measure(network: str, variant: str) -> dict[str, float]:
    kind, build, data, batch = NETWORKS[network]
    module, clock, options = kind(build, 1e-3, (0.9, 0.999)), Clock(), VARIANTS[variant]
    with tempfile.TemporaryDirectory() as folder:
        logging = [] if options is None else [InfluenceCallback(folder, existing="overwrite", **options)]
        settings = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, callbacks=[*logging, clock], **settings)
        start = time.perf_counter()
        trainer.fit(module, DataLoader(data(), batch))
        size = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
        whole = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"step": clock.median, "whole": whole, "bytes": size / (STEPS * batch), "peak": peak}


class Turns(L.Callback):
    """Processor seconds of each step; the sums of per-sample gradients are checked in every second one."""

    def __init__(self) -> None:
        self.on, self.at = False, list[float]()

    def on_train_batch_start(self, *_: Any) -> None:
        self.at.append(time.process_time())
        self.on = not self.on

    @property
    def steps(self) -> list[float]:
        return [b - a for a, b in zip(self.at, self.at[1:], strict=False)]


def taking_turns(turns: Turns) -> ExitStack:
    """The checks of sums, switched by ``turns``."""
    undo = ExitStack()
    for name in ("add", "disagreement"):
        check = getattr(SumCheck, name)
        undo.callback(setattr, SumCheck, name, check)
        setattr(SumCheck, name, lambda *args, check=check: check(*args) if turns.on else None)
    return undo


def checks(network: str) -> dict[str, float]:
    """Steps in units of plain ones: the first without checks and with them, and the later ones."""
    kind, build, data, batch = NETWORKS[network]
    found = dict[str, list[float]]()
    for name, options in (("warm", {}), ("plain", None), ("off", {"verify": False}), ("on", {})):
        turns = Turns()
        with tempfile.TemporaryDirectory() as folder, taking_turns(turns):
            log = [] if options is None else [InfluenceCallback(folder, compression="mask", **options)]
            settings = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
            epochs = 5 if name == "on" else 1
            trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, callbacks=[turns, *log], **settings)
            trainer.fit(kind(build, 1e-3, (0.9, 0.999)), DataLoader(data(), batch))
        found[name] = turns.steps
    plain, steps = statistics.median(found["plain"]), found["on"]
    epochs = {0, *(epoch * STEPS for epoch in (1, 2, 4))}  # whose first batch is verified anew
    pairs = [(steps[i], steps[i + 1]) for i in range(2, len(steps) - 1, 2) if not epochs & {i, i + 1}]
    return {
        "plain step, s": plain,
        "first, off": found["off"][0] / plain,
        "first, on": found["on"][0] / plain,
        "later, off": statistics.median(off for _, off in pairs) / plain,
        "later, on": statistics.median(on for on, _ in pairs) / plain,
        "more, %": 100 * statistics.median(on / off - 1 for on, off in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="network")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only-checks", action="store_true")
    args = parser.parse_args()
    if args.one:
        quiet()
        print(json.dumps(measure(args.networks[0], args.one)))
        return
    for network in [n for n in NETWORKS if any(n.startswith(a) for a in args.networks)]:
        print(network)
        if not args.only_checks:
            show(variants(network, args.rounds), 2)
        quiet()
        show([checks(network)], 2)


def variants(network: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each way of logging."""
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for variant in VARIANTS:
            told = subprocess.run([sys.executable, __file__, network, "--one", variant], capture_output=True, text=True)
            if told.returncode:
                raise RuntimeError(told.stderr)
            found.setdefault(variant, []).append(json.loads(told.stdout.splitlines()[-1]))
    plain = min(r["step"] for r in found["plain"])
    return [
        {
            "logging": variant,
            "ms a step": 1e3 * min(r["step"] for r in rows),
            "times plain": min(r["step"] for r in rows) / plain,
            "whole run, s": min(r["whole"] for r in rows),
            "kB a sample and step": rows[0]["bytes"] / 1e3,
            "peak MB": min(r["peak"] for r in rows),
        }
        for variant, rows in found.items()
    ]


if __name__ == "__main__":
    main()
