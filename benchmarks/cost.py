"""What every part costs beside plain training in the same process: processor and wall seconds, in turns, with the spread.

python benchmarks/cost.py                          # every row, within 15 minutes on an idle core
python benchmarks/cost.py target recording --repeats 5
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from measure import quiet, show
from overhead import gpt2 as large_gpt2
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from workloads import Images, Text, Trained, digits, gpt2, mlp, text

from lightning_influence import InfluenceCallback, SelectionDataModule, attribute

WARM = 4  # steps before the clock of recording and selection starts


@dataclass
class Work:
    """A network, its training data and its queries, or the target of a selection."""

    kind: type[Trained]
    build: Callable[[], nn.Module]
    train: TensorDataset
    batch: int
    queries: TensorDataset
    lr: float = 1e-4
    epochs: int = 1

    def fit(self, *callbacks: L.Callback, data: Any = None) -> Trained:
        module = self.kind(self.build, self.lr, (0.9, 0.999))
        quietly: dict[str, Any] = {
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        with tempfile.TemporaryDirectory() as root:
            quietly |= {"default_root_dir": root, "logger": False, "accelerator": "cpu"}
            trainer = L.Trainer(max_epochs=self.epochs, callbacks=list(callbacks), **quietly)
            trainer.fit(module, DataLoader(self.train, self.batch) if data is None else data)
        return module


@dataclass
class Seconds:
    """Processor and wall seconds of one variant, repeat by repeat."""

    processor: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def measure(self, work: Callable[[], Any]) -> Any:
        wall, processor = time.perf_counter(), time.process_time()
        result = work()
        self.processor.append(time.process_time() - processor)
        self.wall.append(time.perf_counter() - wall)
        return result


class Clock(L.Callback):
    """Processor and wall seconds from the `WARM`-th step of a run to its end, a step."""

    def __init__(self, into: Seconds) -> None:
        self._into, self._start = into, (0.0, 0.0)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == WARM:
            self._start = time.process_time(), time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        steps = trainer.global_step - WARM
        self._into.processor.append((time.process_time() - self._start[0]) / steps)
        self._into.wall.append((time.perf_counter() - self._start[1]) / steps)


def rows_of(what: str, found: dict[str, Seconds], peak: float | None = None) -> Iterator[dict[str, Any]]:
    """One row a variant, in plain runs; the spread is that of the repeats, each beside its own plain run."""
    plain = found["plain"]
    for name, seconds in found.items():
        ratios = [a / b for a, b in zip(seconds.processor, plain.processor, strict=True)]
        yield {
            "what": what,
            "variant": name,
            "processor s": statistics.median(seconds.processor),
            "wall s": statistics.median(seconds.wall),
            "times plain": statistics.median(ratios),
            "from": min(ratios),
            "to": max(ratios),
            "peak MB": peak,
        }


def attributed(what: str, work: Work, variants: dict[str, dict[str, Any]], repeats: int, **record: Any) -> list[Any]:
    """Plain training and attributions of one log, in turns."""
    found = {"plain": Seconds(), **{name: Seconds() for name in variants}}
    work.fit()  # warm
    with tempfile.TemporaryDirectory() as log:
        module = work.fit(InfluenceCallback(log, **record))
        for _ in range(repeats):
            found["plain"].measure(work.fit)
            for name, options in variants.items():
                queries = DataLoader(work.queries, min(len(work.queries), 50))
                found[name].measure(
                    lambda q=queries, o=options: attribute(log, queries=q, model=module, progress=False, **o)
                )  # type: ignore[misc]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return list(rows_of(what, found, peak))


def large_text(steps: int, queries: int = 8) -> Work:
    tokens = torch.randint(512, (steps * 8 + queries, 128), generator=torch.Generator().manual_seed(0))
    return Work(Text, large_gpt2, TensorDataset(tokens[: steps * 8]), 8, TensorDataset(tokens[steps * 8 :]))


def small_text(queries: int, steps: int = 16) -> Work:
    (tokens,) = text().tensors
    own = steps * 16
    return Work(Text, gpt2, TensorDataset(tokens[:own]), 16, TensorDataset(tokens[own : own + queries]))


def target(repeats: int) -> list[Any]:
    variants = {"tangent + Hessian": {"response": "tangent"}, "finite + Hessian": {}}
    variants = {name: {"target": "mean", **options} for name, options in variants.items()}
    return attributed("one target, GPT-2 shape 4 x 256, replay", large_text(20), variants, repeats, record="replay")


def readme(repeats: int) -> list[Any]:
    """The default call of the README on a ReLU network of convolutions."""

    def build() -> nn.Module:
        front = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        back = [nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        return nn.Sequential(*front, *back, nn.Linear(64, 55), nn.ReLU(), nn.Linear(55, 10))

    x, y = digits().tensors
    work = Work(
        Images, build, TensorDataset(x[:1000], y[:1000]), 32, TensorDataset(x[1000:1100], y[1000:1100]), 1e-3, 2
    )
    return attributed(
        "default call, ReLU CNN, 1,000 samples, 100 queries", work, {"attribute": {}}, repeats, record="replay"
    )


def factored(repeats: int) -> list[Any]:
    variants = {"tangent + Fisher": {"response": "tangent"}}
    work, what = small_text(64), "64 queries, factored log, GPT-2 2 x 64"
    return attributed(what, work, variants, repeats, record="gradients", compression="factored")


def large_factored(repeats: int) -> list[Any]:
    variants = {"tangent + Fisher": {"response": "tangent"}}
    work, what = large_text(6, 64), "64 queries, factored log, GPT-2 shape 4 x 256"
    return attributed(what, work, variants, repeats, record="gradients", compression="factored")


def many16(repeats: int) -> list[Any]:
    return attributed(
        "16 queries, replay, GPT-2 2 x 64", small_text(16), {"finite + Hessian": {}}, repeats, record="replay"
    )


def many64(repeats: int) -> list[Any]:
    return attributed(
        "64 queries, replay, GPT-2 2 x 64", small_text(64), {"finite + Hessian": {}}, repeats, record="replay"
    )


def live(what: str, work: Work, variants: dict[str, Callable[[Path], dict[str, Any]]], repeats: int) -> list[Any]:
    """Training runs in turns; each variant makes the arguments of `Work.fit`, given a directory."""
    found = {name: Seconds() for name in variants}
    for _ in range(repeats):
        for name, variant in variants.items():
            with tempfile.TemporaryDirectory() as log:
                options = variant(Path(log))
                work.fit(*options.pop("callbacks", []), Clock(found[name]), **options)
    return list(rows_of(what, found))


def image_work(steps: int) -> Work:
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(steps * 64 + 200, 1, 28, 28, generator=g), torch.randint(10, (steps * 64 + 200,), generator=g)
    cut = steps * 64
    return Work(Images, mlp(784, 256), TensorDataset(x[:cut], y[:cut]), 64, TensorDataset(x[cut:], y[cut:]))


def recording(repeats: int) -> list[Any]:
    def recorded(**options: Any) -> Callable[[Path], dict[str, Any]]:
        return lambda log: {"callbacks": [InfluenceCallback(log, **options)]}

    variants = {"plain": lambda _: {}, "replay": recorded(record="replay"), "auto, the default": recorded()}
    small = live("recording, MLP 784-256-256-10", image_work(150), variants, repeats)
    variants |= {
        "masks of 512": recorded(record="gradients", compression="mask", mask_size=512),
        "factored": recorded(record="gradients", compression="factored"),
    }
    return small + live("recording, GPT-2 shape 4 x 256", large_text(16), variants, repeats)


def selection(repeats: int) -> list[Any]:
    def selecting(work: Work, **options: Any) -> Callable[[Path], dict[str, Any]]:
        def data(_: Path) -> dict[str, Any]:
            wanted, loader = DataLoader(work.queries, len(work.queries)), DataLoader(work.train, work.batch)
            return {"data": SelectionDataModule(loader, wanted, every=1, **options)}

        return data

    rows = []
    for what, work in (("MLP 784-256-256-10, target 200", image_work(60)), ("GPT-2 shape, target 8", large_text(16))):
        variants = {"plain": lambda _: {}, "selecting": selecting(work), "rescored in 4": selecting(work, rescore=4)}
        rows += live(f"selection inside the step, {what}", work, variants, repeats)
    return rows


ROWS = {row.__name__: row for row in (target, readme, factored, large_factored, many16, many64, recording, selection)}


def _row(send: Any, name: str, repeats: int) -> None:
    quiet()
    torch.set_num_threads(1)
    send.send(ROWS[name](repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=list(ROWS), metavar="row", help=", ".join(ROWS))
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    table = []
    context = multiprocessing.get_context("spawn")
    for name in args.rows:  # each in a process of its own, for its peak memory
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_row, args=(send, name, args.repeats))
        process.start()
        send.close()  # so that a process that dies ends the waiting
        table += receive.recv()
        process.join()
        show(table, 2)


if __name__ == "__main__":
    main()
