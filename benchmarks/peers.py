"""Ours beside dattri-llm on the same run: the same first-order scores, and what recording and attribution cost.

pip install 'lightning-influence[peers]'    # not part of the tested versions
python benchmarks/peers.py
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from cost import WARM, Clock, Seconds, Work, image_work, rows_of
from measure import quiet, show
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from workloads import Trained

from lightning_influence import InfluenceCallback, attribute

_SAME = 1e-3  # relative difference of all scores


class DattriRecording(L.Callback):
    """Records a run with dattri-llm: per-sample gradients, and the moments before and after every update."""

    def __init__(self, store: Path) -> None:
        self._store = store

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        import dattri_llm as d

        files = d.GradientStorageManager(str(self._store))
        offload = d.OffloadCallback(offload_interval=1, file_manager=files, recording_type="per_sample")
        self.moments = d.OptimizerStateCallback(pl_module.net, trainer.optimizers[0])
        config = d.HookManagerConfig(linear_io=d.REGISTER_ALL)
        self._manager = d.HookManager(pl_module.net, config=config, callbacks=[offload, self.moments])
        self._collecting = self._manager.collect()
        self._collecting.__enter__()
        self._step = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.moments.record_post(self._step)
        self._step += 1

    def on_train_end(self, *_: Any) -> None:
        self._collecting.__exit__(None, None, None)
        self._manager.remove()


def dattri_queries(module: Trained, queries: TensorDataset, store: Path) -> None:
    """Store the gradient of each query's loss."""
    import dattri_llm as d

    files = d.GradientStorageManager(str(store))
    offload = d.OffloadCallback(offload_interval=1, file_manager=files, recording_type="per_sample")
    manager = d.HookManager(module.net, config=d.HookManagerConfig(linear_io=d.REGISTER_ALL), callbacks=[offload])
    with manager.collect():
        (batch,) = DataLoader(queries, len(queries))
        module.each_loss(batch).sum().backward()  # type: ignore[operator]
    manager.remove()


def dattri_scores(work: Work, train: Path, asked: Path, dynamics: Any, directory: Path) -> Tensor:
    """``(n_samples, n_queries)``, in the order of the data; dattri-llm knows a sample by what it holds."""
    import dattri_llm as d
    from dattri_llm.utils.hashing import hash_batch

    attributor = d.AdamWInfluenceAttributor(d.AttributionArguments(output_dir=str(directory)))
    score = attributor.attribute_from_cache(str(train), str(asked), dynamics=dynamics, propagation="test")
    samples, matrix = score.agnostic_matrix()
    rows, columns = (
        torch.tensor([position[z] for z in hash_batch({"_arg0": data.tensors[0]}, len(data))])
        for data, position in ((work.train, {z: i for i, z in enumerate(samples)}), (work.queries, score.test_index))
    )
    change: Tensor = -matrix[rows][:, columns]  # its sign is that of a harm
    return change


def beside_dattri(work: Work, repeats: int) -> list[dict[str, Any]]:
    recording = {name: Seconds() for name in ("plain", "ours", "dattri-llm")}
    scoring = {name: Seconds() for name in ("plain", "ours", "dattri-llm")}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as name:
            root = Path(name)
            scoring["plain"].measure(lambda: work.fit(Clock(recording["plain"])))
            # the same removal: the sample's share leaves, and the batch is divided by as many as before
            ours = InfluenceCallback(root / "ours", record="gradients", compression="factored")
            module = work.fit(ours, Clock(recording["ours"]))
            theirs = DattriRecording(root / "theirs")
            other = work.fit(theirs, Clock(recording["dattri-llm"]))
            assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
            report = scoring["ours"].measure(_ours(root, work, module))
            matrix = scoring["dattri-llm"].measure(_theirs(root, work, other, theirs.moments.dynamics()))
            _assert_same(report.scores, matrix)
    rows = [*rows_of(f"recording after {WARM} steps, a step", recording)]
    return [*rows, *rows_of(f"{len(work.queries)} queries, tangent + Fisher", scoring)]


def _ours(root: Path, work: Work, module: Trained) -> Callable[[], Any]:
    options: dict[str, Any] = {
        "response": "tangent",
        "curvature": "fisher",
        "counterfactual": "zero",
        "progress": False,
    }
    return lambda: attribute(root / "ours", queries=DataLoader(work.queries, 50), model=module, **options)


def _theirs(root: Path, work: Work, module: Trained, dynamics: Any) -> Callable[[], Tensor]:
    def score() -> Tensor:
        dattri_queries(module, work.queries, root / "queries")
        return dattri_scores(work, root / "theirs", root / "queries", dynamics, root)

    return score


def _assert_same(ours: Tensor, theirs: Tensor) -> None:
    difference = float((ours - theirs).norm() / theirs.norm())
    assert difference <= _SAME, f"the scores of the two differ by {difference:.3g}"
    print(f"first-order scores {tuple(ours.shape)} differ by {difference:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--queries", type=int, default=16)
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    if importlib.util.find_spec("dattri_llm") is None:
        print("dattri-llm is not installed, so there is nothing to compare with.")
        return
    work = image_work(args.steps)
    work.queries = TensorDataset(*(t[: args.queries] for t in work.queries.tensors))
    show(beside_dattri(work, args.repeats), 2)


if __name__ == "__main__":
    main()
