"""The examples run, on small settings."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from lightning_influence import InfluenceReport

FOLDER = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = load("demo")
    fidelity = demo.main(tmp_path, n_train=160, epochs=1, removals=6)
    assert fidelity.keys() == demo.ESTIMATORS.keys() and fidelity[demo.BEST] > 0.9
    assert "retraining of 6 samples" in capsys.readouterr().out
    assert InfluenceReport.load(tmp_path / "report.safetensors").sample_ids.tolist() == list(range(160))
    assert (tmp_path / "report.html").exists() and (tmp_path / "scores.csv").exists()


def test_every_example_is_tested() -> None:
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {p.stem for p in FOLDER.glob("*.py")} <= tested


def test_digits_mlp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = load("digits_mlp").main(["--n-train", "96", "--epochs", "1", "--width", "8", "--out", str(tmp_path)])
    assert report.sample_ids.tolist() == list(range(96))
    assert f"sample {report.top(1).sample_id[0]}, a " in capsys.readouterr().out
    assert (tmp_path / "scores.csv").exists()


def test_mnist_cnn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = load("mnist_cnn").main(["--n-train", "256", "--epochs", "2", "--out", str(tmp_path)])
    assert 0 <= found <= 1
    assert "of them are among the fifth" in capsys.readouterr().out
    assert 'id="mislabelled"' in (tmp_path / "report.html").read_text()


def test_gpt2_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--n-train", "32", "--tokens", "16", "--width", "16", "--layers", "1", "--out", str(tmp_path)]
    report = load("gpt2_text").main(options)
    assert report.scores.shape == (32, 2) and report.scores.isfinite().all()
    assert "query 1:" in capsys.readouterr().out
    assert (tmp_path / "report.html").read_text().count('<div class="tokens"') == 6


def test_llama_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--n-train", "16", "--epochs", "1", "--tokens", "32", "--width", "16", "--weights", "no/such-model"]
    report = load("llama_lora").main([*options, "--out", str(tmp_path)])
    assert "built from a configuration" in capsys.readouterr().out
    assert report.metadata["coverage"]["fraction"] == 1.0
    assert all("lora" in name for name in report.metadata["coverage"]["parameters"])


def test_plain_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = load("plain_loop").main(["--out", str(tmp_path)])
    assert report.sample_ids.tolist() == list(range(64)) and report.scores.isfinite().all()
    assert (tmp_path / "report.html").exists() and "The page is" in capsys.readouterr().out
