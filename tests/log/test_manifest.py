"""What a log says it is of, and that a log is opened once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from lightning_influence import InfluenceCallback, attribute, check_faithfulness, error_proxy
from lightning_influence.errors import LogCorrupted
from lightning_influence.log.manifest import Manifest, Mask, Recorded
from lightning_influence.log.reader import StoreReader
from lightning_influence.log.writer import StoreWriter
from tests.modules import Classifier, digits, fit, loader

WHOLE = Manifest(
    module="a.B",
    optimizer="AdamW",
    update="adam",
    record="both",
    frozen_batch_norm=False,
    parameters=[{"name": "w", "module": "Linear"}],
    shapes={"w": [2, 3]},
    excluded=["b*"],
    coverage=Recorded(6, 6),
    compression="auto",
    mask=Mask(8, 0),
    reduction="mean",
    precision="32-true",
    versions={"torch": "2"},
    run="abc",
)


def written(path: Path, content: dict[str, Any]) -> StoreReader:
    with StoreWriter(path) as writer:
        writer.write_manifest(content)
    return StoreReader(path)


@pytest.mark.parametrize("manifest", [WHOLE, replace(WHOLE, run=None)])
def test_a_manifest_is_read_as_it_was_written(manifest: Manifest, tmp_path: Path) -> None:
    assert Manifest.of(written(tmp_path / "log", manifest.to_json())) == manifest


FORGERIES: dict[str, Any] = {
    "module": 1,
    "optimizer": None,
    "update": "lion",
    "record": "everything",
    "frozen_batch_norm": "no",
    "parameters": 3,
    "shapes": {"w": "ab"},
    "excluded": "b*",
    "coverage": {"trained": -1, "recorded": 1},
    "compression": [],
    "mask": {"size": 1.5, "seed": 0},
    "reduction": {},
    "precision": 32,
    "versions": [],
    "run": 7,
}


@pytest.mark.parametrize("key", FORGERIES)
def test_a_forged_manifest_is_corrupted(key: str, tmp_path: Path) -> None:
    reader = written(tmp_path / "log", WHOLE.to_json() | {key: FORGERIES[key]})
    with pytest.raises(LogCorrupted, match=f"manifest of .*{key}"):
        Manifest.of(reader)


@pytest.mark.parametrize("key", sorted(WHOLE.to_json().keys() - {"run"}))
def test_a_manifest_without_one_of_its_entries_is_corrupted(key: str, tmp_path: Path) -> None:
    content = WHOLE.to_json()
    del content[key]
    with pytest.raises(LogCorrupted, match=key):
        Manifest.of(written(tmp_path / "log", content))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifier, Path]:
    module, log = Classifier(), tmp_path_factory.mktemp("run")
    fit(module, loader(digits(32)), InfluenceCallback(log, record="both"))
    return module, log


QUERIES = DataLoader(digits(8), 4)
VERBS: dict[str, Callable[[Classifier, Path], object]] = {
    "fisher": lambda m, log: attribute(log, queries=QUERIES, model=m, curvature="fisher", progress=False),
    "hessian": lambda m, log: attribute(log, queries=QUERIES, model=m, curvature="hessian", progress=False),
    "error_proxy": lambda m, log: error_proxy(log, queries=QUERIES, model=m, pairs=2, progress=False),
    "check_faithfulness": lambda m, log: check_faithfulness(
        log, model=m, data=digits(32), queries=QUERIES, removals=3, ceiling=False, dtype=None, progress=False
    ),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_log_is_opened_once(verb: str, run: tuple[Classifier, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    plain = StoreReader.__init__

    def counted(self: StoreReader, dirpath: str | Path) -> None:
        opened.append(dirpath)
        plain(self, dirpath)

    monkeypatch.setattr(StoreReader, "__init__", counted)
    VERBS[verb](*run)
    assert opened == [run[1]]
