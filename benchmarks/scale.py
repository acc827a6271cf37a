"""The sweep of a large log: memory, and time over steps and samples.

    python benchmarks/scale.py            # up to 100,000 samples x 1,000 steps

The log is synthetic: a run of AdamW whose per-sample gradients are random, masked to 512 coordinates of each of two
parameters. Each size is written, and swept, in a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import show

from lightning_influence.core.coordinates import Coordinates
from lightning_influence.core.optimizers import UPDATES
from lightning_influence.core.shares import Dense
from lightning_influence.core.sweep import Method, sweep
from lightning_influence.core.trajectory import StepRecord
from lightning_influence.log.manifest import Manifest, Mask, Recorded
from lightning_influence.log.steps import LAYOUT, MOMENTS_EVERY, LoggedTrajectory, pack_layout, pack_step
from lightning_influence.log.writer import StoreWriter

KEPT, SHAPE, QUERIES = 512, (256, 256), 4
NAMES = ("first.weight", "second.weight")
HYPER = {
    "lr": 1e-3, "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "maximize": 0.0, "decoupled": 1.0,
}  # fmt: skip
SIZE = SHAPE[0] * SHAPE[1] * len(NAMES)
MANIFEST = Manifest(
    module="benchmark",
    optimizer="AdamW",
    update="adam",
    record="gradients",
    frozen_batch_norm=False,
    parameters=[],
    shapes=dict.fromkeys(NAMES, SHAPE),
    excluded=[],
    coverage=Recorded(SIZE, SIZE),
    compression="mask",
    mask=Mask(KEPT, 0),
    reduction="mean",
    precision="32-true",
)
SIZES = [(250, 100), (500, 100), (1000, 100), (250, 400)]  # steps, samples in each


def write(log: Path, steps: int, batch: int) -> None:
    """A log of random gradients, moments followed as AdamW would."""
    g = torch.Generator().manual_seed(0)
    index = torch.randperm(SHAPE[0] * SHAPE[1], generator=g)[:KEPT].sort().values
    keeps = {name: Coordinates("mask", SHAPE, index) for name in NAMES}
    moments = {name: (torch.zeros(KEPT), torch.zeros(KEPT)) for name in NAMES}
    with StoreWriter(log) as writer:
        writer.write_manifest(MANIFEST.to_json())
        writer.save(LAYOUT, *pack_layout(keeps, "adam"))
        for t in range(steps):
            shares = {name: Dense(torch.randn(batch, KEPT, generator=g) / batch) for name in NAMES}
            hyper = {name: {**HYPER, "step": float(t + 1)} for name in NAMES}
            gradients = {name: share.values.sum(0) for name, share in shares.items()}
            record = StepRecord(
                index=t,
                sample_ids=torch.arange(t * batch, (t + 1) * batch),
                loss_weights=torch.full((batch,), 1 / batch, dtype=torch.float64),
                micro_batch_numbers=torch.zeros(batch, dtype=torch.int64),
                gradients=gradients,
                moments=moments if t % MOMENTS_EVERY == 0 else {},
                hyper=hyper,
            )
            writer.append(t, *pack_step(record, shares, state=True))
            moments = {k: UPDATES["adam"].apply(moments[k], gradients[k], hyper[k])[1] for k in NAMES}


def read(log: Path, response: Any) -> float:
    """Processor seconds of the sweep."""
    run = LoggedTrajectory(log)
    queries = {name: torch.randn(QUERIES, KEPT, generator=torch.Generator().manual_seed(1)) for name in NAMES}
    start = time.process_time()
    sweep(run, queries, Method("fisher", response), progress=False)
    return time.process_time() - start


def peak_of(work: Callable[..., Any], *args: Any) -> tuple[Any, float, float]:
    """What work gives in a process of its own, its seconds, and its peak memory in MB."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(send, work, args))
    process.start()
    found: tuple[Any, float, float] = receive.recv()
    process.join()
    return found


def _peak(send: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    start = time.perf_counter()
    result = work(*args)
    send.send((result, time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fraction", type=float, default=1.0, help="of the steps, for a shorter run")
    args = parser.parse_args()
    rows = []
    for steps, batch in SIZES:
        steps = round(args.fraction * steps)
        with tempfile.TemporaryDirectory() as name:
            log = Path(name) / "log"
            _, writing, _ = peak_of(write, log, steps, batch)
            size = sum(f.stat().st_size for f in log.rglob("*.safetensors")) / 1e6
            tangent, _, small = peak_of(read, log, "tangent")
            finite, _, large = peak_of(read, log, "finite")
        rows.append({"steps": steps, "samples": steps * batch, "log MB": size, "writing s": writing})
        rows[-1] |= {"tangent s": tangent, "peak MB": small, "finite s": finite, "its peak MB": large}
    show(rows, 1)


if __name__ == "__main__":
    main()
