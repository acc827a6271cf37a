"""Logs behind URLs: read as those of a directory are, a few files at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from modules import Classifier, fit, loader, split_digits

from lightning_influence import InfluenceCallback, attribute
from lightning_influence.errors import LogCorrupted, LogError
from lightning_influence.log import place
from lightning_influence.log.reader import StoreReader
from lightning_influence.trust.dynamics import training_dynamics

STEPS = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A log in a directory, its module and queries."""
    log = tmp_path_factory.mktemp("run") / "log"
    train, val = split_digits(8 * STEPS, 4)
    module = Classifier()
    fit(module, loader(train, 8), InfluenceCallback(log, record="both", snapshot_every=4))
    return log, module, [val.tensors]


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, run: tuple[Path, Any, Any], tmp_path: Path) -> str:
    """The same log behind a URL."""
    url = f"{request.param}://{tmp_path}/there"
    files, base = fsspec.core.url_to_fs(url)
    for path in run[0].rglob("*"):
        if path.is_file():
            files.makedirs(f"{base}/{path.relative_to(run[0]).parent}", exist_ok=True)
            files.put_file(str(path), f"{base}/{path.relative_to(run[0])}")
    return url


@pytest.mark.parametrize("curvature", ["fisher", "hessian"])
def test_a_log_is_read_from_a_url(
    run: tuple[Path, Any, Any], url: str, curvature: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "KEPT", 3)
    log, module, queries = run
    options: dict[str, Any] = {"queries": queries, "model": module, "target": "mean", "curvature": curvature}
    near = attribute(log, **options, progress=False)
    far = attribute(url, **options, progress=False)
    assert torch.equal(far.rows.scores, near.rows.scores)
    assert torch.equal(far.sample_ids, near.sample_ids)
    pairs = zip(vars(training_dynamics(url)).values(), vars(training_dynamics(log)).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))


def test_only_a_few_shards_are_kept_here(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "KEPT", 3)
    reader = StoreReader(url)
    fetched: list[str] = []
    real = place.RemotePlace._fetch
    monkeypatch.setattr(
        place.RemotePlace, "_fetch", lambda self, name, path: (fetched.append(name), real(self, name, path))[1]
    )
    for _ in range(2):
        for step in (0, 1, 2):
            assert len(reader.tensor(step, "sample_ids")) == 8
    assert len(fetched) == 3
    for step in range(STEPS):
        reader.tensor(step, "sample_ids")
    here = reader._root.root
    assert len(list(here.rglob("*.safetensors"))) == 3
    assert reader.nbytes == StoreReader(url).nbytes > 0
    del reader
    assert not here.exists()


def test_errors_name_the_url(url: str, tmp_path: Path) -> None:
    files, base = fsspec.core.url_to_fs(url)
    with pytest.raises(LogError, match="none: no such directory"):
        StoreReader(f"{url}/none")
    with pytest.raises(LogError, match="rank-0 is not a log"):
        StoreReader(f"{url}/rank-0")
    files.pipe_file(
        f"{base}/rank-0/step-00000003.safetensors", files.cat_file(f"{base}/rank-0/step-00000004.safetensors")
    )
    with pytest.raises(LogCorrupted, match=f"{url}/rank-0/step-00000003.safetensors is not what was written"):
        StoreReader(url).tensor(3, "sample_ids")
    files.rm_file(f"{base}/rank-0/step-00000005.safetensors")
    with pytest.raises(LogCorrupted, match=f"{url}/rank-0/step-00000005.safetensors is not .*: it is not there"):
        StoreReader(url).tensor(5, "sample_ids")
    index = files.cat_file(f"{base}/rank-0/index.jsonl")
    files.pipe_file(f"{base}/rank-0/index.jsonl", index.replace(b"step", b"stop", 1))
    with pytest.raises(LogCorrupted, match=f"{url}/rank-0/index.jsonl, line"):
        StoreReader(url)
    files.rm_file(f"{base}/rank-0/index.jsonl")
    with pytest.raises(LogCorrupted, match=f"{url}/rank-0 has no index.jsonl"):
        StoreReader(url)


def test_a_protocol_that_nobody_knows_is_told() -> None:
    with pytest.raises(LogError, match="the log nowhere://run cannot be opened: Protocol not known: nowhere"):
        StoreReader("nowhere://run")
