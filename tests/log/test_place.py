"""Logs behind URLs: read as those of a directory are, a few files at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import fsspec.implementations.memory
import pytest
import torch
from modules import Classifier, fit, loader, split_digits

from lightning_influence import InfluenceCallback, attribute
from lightning_influence.errors import ConfigurationError, LogCorrupted, LogError
from lightning_influence.log import place
from lightning_influence.log.reader import StoreReader
from lightning_influence.log.writer import StoreWriter
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


# -- writing -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "file"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A URL at which there is nothing yet."""
    return f"{request.param}://{tmp_path}/new"


def trained(log: Any, **options: Any) -> Classifier:
    module = Classifier()
    fit(module, loader(split_digits(8 * STEPS, 4)[0], 8), InfluenceCallback(log, snapshot_every=4, **options))
    return module


def content(url: str) -> dict[str, bytes]:
    files, base = fsspec.core.url_to_fs(url)
    return {path.removeprefix(f"{base}/"): files.cat_file(path) for path in files.find(base)}


def test_a_log_is_written_to_a_url(run: tuple[Path, Any, Any], target: str) -> None:
    module = trained(target, record="both")
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), run[1].parameters(), strict=True))
    near = {str(p.relative_to(run[0])): p.read_bytes() for p in run[0].rglob("*") if p.is_file()}
    far = content(target)
    assert far.keys() == near.keys() - {"rank-0/lock"}
    assert all(far[name] == near[name] for name in far if "snapshot" in name)  # steps hold random states, too
    expected = attribute(run[0], queries=run[2], model=run[1], target="mean", progress=False)
    found = attribute(target, queries=run[2], model=module, target="mean", progress=False)
    assert torch.equal(found.rows.scores, expected.rows.scores)


def test_what_is_uploaded_is_not_kept_here(target: str) -> None:
    with StoreWriter(target) as writer:
        writer.write_manifest({})
        for step in range(5):
            writer.append(step, {"x": torch.ones(100)}, {})
        writer.flush()
        assert not list(writer.place.root.rglob("*.safetensors"))
        assert len(StoreReader(target)) == 5


def test_a_log_at_a_url_is_refused_overwritten_or_gone_on_with(target: str) -> None:
    trained(target, record="gradients")
    with pytest.raises(LogError, match=f"{target} already holds a log of {STEPS} steps"):
        trained(target, record="gradients")
    trained(target, record="gradients", existing="resume")
    assert len(StoreReader(target)) == 2 * STEPS
    trained(target, record="replay", existing="overwrite")
    reader = StoreReader(target)
    assert len(reader) == STEPS
    assert reader.tensor(0, "sample_ids").shape == (8,)


class Refuses(fsspec.implementations.memory.MemoryFileSystem):
    """Takes some files, and then no more."""

    protocol = "refuses"
    left = 0

    def put_file(self, *args: Any, **options: Any) -> None:
        Refuses.left -= 1
        if Refuses.left < 0:
            raise OSError("no room")
        super().put_file(*args, **options)


def eight_steps(url: str) -> None:
    with StoreWriter(url) as writer:
        writer.write_manifest({})
        for step in range(8):
            writer.append(step, {"x": torch.full((3,), float(step))}, {})
        writer.flush()


@pytest.mark.parametrize("taken", range(3, 12))
def test_an_upload_that_ends_anywhere_leaves_whole_steps(taken: int, tmp_path: Path) -> None:
    """An index, a manifest, then a shard and an index for each step: whatever comes last, what the index tells is there."""
    fsspec.register_implementation("refuses", Refuses, clobber=True)
    Refuses.left = taken
    url = f"refuses://{tmp_path}/log"
    with pytest.raises(LogError, match="could not be written: no room"):
        eight_steps(url)
    reader = StoreReader(url)
    assert len(reader) == (taken - 2) // 2
    for step in range(len(reader)):
        assert torch.equal(reader.tensor(step, "x"), torch.full((3,), float(step)))


def test_recording_that_stops_is_noted_at_the_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("refuses", Refuses, clobber=True)
    Refuses.left = 9
    url = f"refuses://{tmp_path}/run"
    real = Refuses.put_file

    def put_file(self: Any, here: str, there: str, **options: Any) -> None:
        if there.endswith("missing.json"):
            Refuses.left = 1
        real(self, here, there, **options)

    monkeypatch.setattr(Refuses, "put_file", put_file)
    with pytest.warns(UserWarning, match="lacks the steps from"):
        trained(url, record="gradients")
    reader = StoreReader(url)
    assert 0 < len(reader) < STEPS
    assert any("no room" in why for why in reader.missing.values())


def test_a_report_at_a_url_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="report=True writes the report into the log's directory"):
        InfluenceCallback("memory://run", report=True)
