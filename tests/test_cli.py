"""The command line, and a LightningCLI that knows the callback and the datamodule from yaml alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from modules import Classifier, digits, fit
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceReport, SelectionDataModule, tune_horizon
from lightning_influence.cli import main


class Digits(L.LightningDataModule):
    """40 training and 20 validation samples."""

    def train_dataloader(self) -> Any:
        return DataLoader(digits(40), 8)

    def val_dataloader(self) -> Any:
        x, y = digits(60).tensors
        return DataLoader(TensorDataset(x[40:], y[40:]), 10)


class Net(Classifier):
    """Of a width that a configuration gives."""

    def __init__(self, width: int = 8, lr: float = 1e-3) -> None:
        super().__init__(lambda m: torch.optim.AdamW(m.parameters(), lr=m.lr), width=width)
        self.lr = lr


@pytest.fixture
def run(tmp_path: Path) -> Path:
    trainer = fit(Net(), Digits().train_dataloader(), InfluenceCallback(tmp_path / "log", record="replay"))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    (tmp_path / "run.yaml").write_text(
        "model:\n  class_path: test_cli.Net\n  init_args:\n    width: 8\ndata:\n  class_path: test_cli.Digits\n"
    )
    return tmp_path


def test_the_whole_way(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run / "log")]) == 0
    assert "5 optimizer steps" in capsys.readouterr().out
    known = [f"--config={run / 'run.yaml'}", f"--checkpoint={run / 'last.ckpt'}"]
    assert main(["attribute", str(run / "log"), *known, f"--out={run / 's.safetensors'}"]) == 0
    assert "most harmful" in capsys.readouterr().out
    assert InfluenceReport.load(run / "s.safetensors").metadata["curvature"] == "hessian"
    assert main(["report", str(run / "s.safetensors"), f"--out={run / 'r.html'}", "--data=test_cli.Digits"]) == 0
    assert "<th>0</th><td>0</td>" in (run / "r.html").read_text(), "digits are shown as a table of their pixels"
    assert main(["select", str(run / "s.safetensors"), "--keep=0.5", f"--out={run / 'kept.txt'}"]) == 0
    assert len((run / "kept.txt").read_text().split()) == 20
    assert main(["check", str(run / "log"), *known, "--removals=5"]) == 0
    assert "ceiling" in capsys.readouterr().out


def test_horizon_and_rate_are_tuned(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run / "tuning.csv"
    sweep = ["--horizons=[0,2]", "--learning_rates=[0.0001,0.01]", "--max_steps=5", "--keep=0.5", "--proxies=2"]
    assert main(["tune", f"--config={run / 'run.yaml'}", *sweep, f"--out={out}"]) == 0
    assert "at learning rate 0.01" in capsys.readouterr().out, "five steps at 1e-4 learn nothing"
    table = pd.read_csv(out).set_index(["horizon", "lr"])
    assert len(table) == 4
    assert (run / "tuning.png").exists()
    assert table.proxy[2, 1e-2] > table.proxy[2, 1e-4] > 0, "errors grow with the learning rate"
    assert main(["tune", f"--config={run / 'run.yaml'}", "--attribute=speed"]) == 1
    assert "Net has no 'speed'" in capsys.readouterr().err
    assert main(["tune"]) == 1
    assert "--model and --data missing" in capsys.readouterr().err


def test_errors_are_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "none")]) == 1
    told = capsys.readouterr().err
    assert "no such directory" in told and "Traceback" not in told
    assert main(["attribute", str(tmp_path), "--checkpoint=x"]) == 1
    assert "--model and --data missing" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["attribute", "--nonsense"])
    assert stopped.value.code == 2
    with pytest.raises(SystemExit) as helped:
        main(["attribute", "--help"])
    assert helped.value.code == 0
    assert "Example: lightning-influence attribute" in capsys.readouterr().out


def test_yaml_alone_adds_callback_and_selection(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
    - class_path: lightning_influence.InfluenceCallback
      init_args: {{dirpath: {tmp_path / "log"}, record: replay, report: true}}
model: {{class_path: test_cli.Net}}
data: {{class_path: test_cli.Digits}}
"""
    )
    LightningCLI(
        save_config_callback=None, subclass_mode_model=True, subclass_mode_data=True, args=["fit", f"--config={config}"]
    )
    assert (tmp_path / "log" / "report.html").exists()
    selecting = config.read_text().split("  callbacks:")[0]
    config.write_text(
        selecting
        + "model: {class_path: test_cli.Net}\ndata:\n  class_path: lightning_influence.SelectionDataModule\n"
        + "  init_args: {data: {class_path: test_cli.Digits}, keep: 0.5}\n"
    )
    told = LightningCLI(
        save_config_callback=None, subclass_mode_model=True, subclass_mode_data=True, args=["fit", f"--config={config}"]
    )
    assert isinstance(told.datamodule, SelectionDataModule)
    assert told.datamodule.selection_report.kept == pytest.approx(0.5)


def test_horizon_and_learning_rate_are_tuned_together() -> None:
    data = Digits()
    x, y = digits(90).tensors
    held_out = [(x[60:], y[60:])]
    found = tune_horizon(
        lambda lr: Net(lr=lr), data.train_dataloader(), data.val_dataloader(), held_out,
        horizons=(0, 2), learning_rates=(1e-4, 1e-2), max_steps=40, keep=0.5, trainer={"accelerator": "cpu"},
    )  # fmt: skip
    assert found.table.shape == (4, 4) and set(found.table.horizon) == {0, 2}
    assert found.best[1] == 1e-2, "forty steps at 1e-4 learn nothing"
    assert found.table.loss.min() == found.table.set_index(["horizon", "lr"]).loss[found.best]
    assert found.plot().axes[0].get_title() == "held-out loss"
