"""The command line, and a LightningCLI that knows the callback and the datamodule from yaml alone."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.cli import LightningCLI
from modules import Classifier, Forked, digits, fit
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_influence import (
    InfluenceCallback,
    InfluenceReport,
    SelectionDataModule,
    clean,
    token_scores,
    training_dynamics,
    tune_horizon,
)
from lightning_influence.cli import main
from lightning_influence.errors import ConfigurationError
from lightning_influence.log.writer import StoreWriter
from lightning_influence.report.tokens import TokenScores
from lightning_influence.run.data import TrainingData


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
    bare = (run / "r.html").read_text()
    shown = ["report", str(run / "s.safetensors"), f"--out={run / 'r.html'}", "--data=test_cli.Digits"]
    assert main([*shown, f"--log={run / 'log'}"]) == 0
    assert 'id="mislabelled"' in (run / "r.html").read_text() and 'id="mislabelled"' not in bare
    assert "<th>0</th><td>0</td>" in (run / "r.html").read_text(), "digits are shown as a table of their pixels"
    assert main(["select", str(run / "s.safetensors"), "--keep=0.5", f"--out={run / 'kept.txt'}"]) == 0
    assert len((run / "kept.txt").read_text().split()) == 20
    assert main(["check", str(run / "log"), *known, "--removals=5"]) == 0
    assert "ceiling" in capsys.readouterr().out


def torchrun(arguments: list[str]) -> str:
    """What the two processes print that it starts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    paths = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    command += ["lightning_influence", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def as_of_torchrun(rank: int, port: int, arguments: list[str]) -> None:
    """A process with the environment and the command of one that torchrun has started."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="one", CUDA_VISIBLE_DEVICES=""
    )
    sys.argv[1:] = arguments
    runpy.run_module("lightning_influence", run_name="__main__", alter_sys=True)


def forked(arguments: list[str]) -> str:
    """The same of two processes that begin with everything imported."""
    port = find_free_network_port()
    done = [process.wait() for process in [Forked(as_of_torchrun, rank, port, arguments) for rank in range(2)]]
    assert all(code == 0 for code, _, _ in done), done
    return "".join(out for _, out, _ in done)


@pytest.mark.parametrize("started", [forked, pytest.param(torchrun, marks=pytest.mark.slow)])
def test_processes_of_torchrun_share_the_work(run: Path, started: Callable[[list[str]], str]) -> None:
    """Both compute, the first writes and prints, and the scores are those of one."""
    known = [str(run / "log"), f"--config={run / 'run.yaml'}", f"--checkpoint={run / 'last.ckpt'}", "--target=mean"]
    assert main(["attribute", *known, f"--out={run / 'alone.safetensors'}"]) == 0
    told = started(["attribute", *known, f"--out={run / 'two.safetensors'}"])
    assert told.count("wrote ") == 1
    alone, two = (InfluenceReport.load(run / f"{name}.safetensors") for name in ("alone", "two"))
    assert torch.equal(two.sample_ids, alone.sample_ids)
    torch.testing.assert_close(two.scores, alone.scores, rtol=1e-3, atol=1e-4 * float(alone.scores.abs().max()))


class OtherDigits(pl.LightningDataModule):
    """The same of the package's other name; what it splits off is another set each time that it is set up."""

    set_up = 0

    def setup(self, stage: str) -> None:
        type(self).set_up += 1
        self.train, self.val = random_split(digits(60), [40, 20])

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, 8)

    def val_dataloader(self) -> Any:
        return DataLoader(self.val, 10)


class OtherNet(pl.LightningModule):
    def __init__(self, width: int = 8, lr: float = 1e-3) -> None:
        super().__init__()
        self.net, self.lr = torch.nn.Sequential(torch.nn.Linear(64, width), torch.nn.Linear(width, 10)), lr

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def test_modules_of_the_package_s_other_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    callback: Any = InfluenceCallback(tmp_path / "log", record="replay")
    trainer = pl.Trainer(max_epochs=1, callbacks=[callback], limit_val_batches=0, **options)
    trainer.fit(OtherNet(), OtherDigits())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    for verb, more in {
        "attribute": ["--target=mean", f"--out={tmp_path / 's.safetensors'}"],
        "check": ["--removals=3"],
    }.items():
        OtherDigits.set_up = 0
        given = ["--model=test_cli.OtherNet", "--data=test_cli.OtherDigits", f"--checkpoint={tmp_path / 'last.ckpt'}"]
        assert main([verb, str(tmp_path / "log"), *given, *more]) == 0, capsys.readouterr().err
        assert OtherDigits.set_up == 1
    config = tmp_path / "run.yaml"
    config.write_text(
        "model: {class_path: test_cli.OtherNet, init_args: {width: 4}}\ndata: {class_path: test_cli.OtherDigits}\n"
    )
    sweep = ["--horizons=[0]", "--learning_rates=[0.001,0.01]", "--max_steps=2", f"--out={tmp_path / 't.csv'}"]
    assert main(["tune", f"--config={config}", *sweep]) == 0, capsys.readouterr().err


def test_groups_samples_and_a_loss_of_ones_own_are_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run's end is in its log, so that no checkpoint is needed; ids and groups come in files."""
    log, known = str(run / "log"), f"--config={run / 'run.yaml'}"
    (run / "ids.csv").write_text("sample_id,score\n3,0.1\n7,0.2\n")
    (run / "labels.txt").write_text(
        "".join("even\n" if z % 2 == 0 else ("\n" if z % 3 else "third\n") for z in range(40))
    )
    (run / "groups.json").write_text('{"first": [0, 1, 2], "second": [2, 3]}')
    out = ["--target=mean", "--progress=false", f"--out={run / 's.safetensors'}"]
    table = f"--groups_out={run / 'groups.csv'}"
    known_groups = [f"--groups={run / 'labels.txt'}", table]
    assert main(["attribute", log, known, f"--samples={run / 'ids.csv'}", *known_groups, *out]) == 0
    assert "even" in capsys.readouterr().out
    found = InfluenceReport.load(run / "s.safetensors")
    pd.testing.assert_frame_equal(pd.read_csv(run / "groups.csv"), found.groups.to_pandas(), check_dtype=False)
    assert main(["attribute", log, known, table, *out]) == 2
    assert "but no groups were named; name them with --groups" in capsys.readouterr().err
    assert found.sample_ids.tolist() == [3, 7]
    assert found.groups is not None and found.groups.sizes == [20, 7] and found.groups.names == ["even", "third"]
    own = [
        "--query_loss=test_cli.squares",
        f"--groups={run / 'groups.json'}",
        "--samples=[3]",
        "--max_memory=1000000000",
    ]
    assert main(["attribute", log, known, *own, *out]) == 0
    other = InfluenceReport.load(run / "s.safetensors")
    assert other.groups is not None and other.groups.names == ["first", "second"]
    assert not torch.allclose(other.scores[0], found.scores[0], rtol=0.1)
    page = ["report", str(run / "s.safetensors"), "--data=test_cli.Digits", "--title=Mine", "--show=test_cli.shown"]
    assert main([*page, f"--groups={run / 'labels.txt'}", f"--out={run / 'r.html'}"]) == 0
    assert "Mine" in (run / "r.html").read_text() and "the sum is" in (run / "r.html").read_text()
    assert main(["compare", str(run / "s.safetensors"), str(run / "s.safetensors"), f"--out={run / 'c.csv'}"]) == 0
    assert pd.read_csv(run / "c.csv").change.tolist() == [0.0]
    for option, text, told in (
        ("samples", "a\nb\n", "holds 'b'"),
        ("groups", "{", "is not JSON"),
        ("samples", "", "no id"),
    ):
        (run / "wrong").write_text(text)
        assert main(["attribute", log, known, f"--{option}={run / 'wrong'}"]) == 2
        assert told in capsys.readouterr().err


def test_suspects_and_dynamics_are_tables_of_the_log(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, known = run / "log", [f"--config={run / 'run.yaml'}"]
    some = ["--samples=[0,1,2,3,4,5]", "--curvature=none", f"--out={run / 's.safetensors'}"]
    assert main(["attribute", str(log), *known, *some]) == 0
    scored = InfluenceReport.load(run / "s.safetensors")
    assert main(["suspects", str(log), f"--out={run / 'alone.csv'}"]) == 0
    assert main(["suspects", str(log), f"--scores={run / 's.safetensors'}", f"--out={run / 'both.csv'}"]) == 0
    alone, both = pd.read_csv(run / "alone.csv"), pd.read_csv(run / "both.csv")
    pd.testing.assert_frame_equal(both[list(alone.columns)], alone)
    harm = both.set_index("sample_id").relative_harm.dropna()
    theirs = scored.suspects(6).set_index("sample_id").relative_harm
    assert len(harm) and harm.to_dict() == pytest.approx(theirs[harm.index].to_dict())
    order = ["select", str(run / "s.safetensors"), "--k=2", "--by=suspicion", f"--left_out={run / 'gone.txt'}"]
    assert main([*order, f"--log={log}", f"--out={run / 'kept.txt'}"]) == 0
    assert [int(z) for z in (run / "gone.txt").read_text().split()] == alone.sample_id[:2].tolist()

    assert main(["dynamics", str(log), f"--out={run / 'd.csv'}"]) == 0
    pd.testing.assert_frame_equal(pd.read_csv(run / "d.csv"), training_dynamics(log).to_pandas())
    assert (run / "d.png").exists() and "40 samples, 40 visits" in capsys.readouterr().out
    assert main(["dynamics", str(log), *known, f"--out={run / 'd.csv'}"]) == 0
    assert (pd.read_csv(run / "d.csv").visits == 2).all()


class Texts(L.LightningDataModule):
    """Twelve training and three validation texts of eight tokens."""

    def texts(self, ids: range) -> Any:
        made = torch.randint(0, 16, (15, 8), generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(made[ids.start : ids.stop]), 3)

    def train_dataloader(self) -> Any:
        return self.texts(range(12))

    def val_dataloader(self) -> Any:
        return self.texts(range(12, 15))


class Next(L.LightningModule):
    """Each token from the one before it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Embedding(16, 8), torch.nn.GELU(), torch.nn.Linear(8, 16))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        (tokens,) = batch
        return torch.nn.functional.cross_entropy(self.net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def test_scores_of_tokens_are_written_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, data, log, table = Next(), Texts(), tmp_path / "log", tmp_path / "tokens.csv"
    fit(module, data.train_dataloader(), InfluenceCallback(log, record="replay"))
    known = ["--model=test_cli.Next", "--data=test_cli.Texts", "--progress=false"]
    assert main(["tokens", str(log), *known, "--samples=[4,1]", f"--out={table}"]) == 0, capsys.readouterr().err
    held: Any = data.val_dataloader()
    expected = token_scores(log, [1, 4], queries=held, model=module, data=data, progress=False)
    read = TokenScores.from_pandas(pd.read_csv(table))
    assert read.sample_ids.tolist() == [1, 4]
    for name in ("tokens", "positions", "scores"):
        for ours, theirs in zip(getattr(read, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(ours.to(theirs.dtype), theirs)
    scores = tmp_path / "s.safetensors"
    assert main(["attribute", str(log), *known, "--target=mean", f"--out={scores}"]) == 0
    page = tmp_path / "page.html"
    assert main(["report", str(scores), f"--tokens={table}", f"--out={page}"]) == 0
    assert page.read_text().count('<div class="tokens"') == 2
    wrong = {"sample_id,token\n1,2\n": "no column 'position'", "sample_id,position,token,score\n1,0,a,1\n": "'token'"}
    for content, told in (wrong | {"": "No columns", "sample_id,position,token,score\n1,0,1,nan\n": "'score'"}).items():
        table.write_text(content)
        assert main(["report", str(scores), f"--tokens={table}", f"--out={page}"]) == 2
        assert told in capsys.readouterr().err


def test_the_page_takes_groups_as_attribute_does(tmp_path: Path) -> None:
    """A label on each line, empty for none; or names with ids, which may overlap."""
    InfluenceReport.from_rows(torch.arange(12), torch.arange(12), torch.ones(12, 1)).save(tmp_path / "s")
    (tmp_path / "labels.txt").write_text("".join(f"{'' if z % 3 else 'third'}\n" for z in range(12)))
    (tmp_path / "groups.json").write_text(json.dumps({"a": [*range(10)], "b": [7, 8, 9, 10]}))
    for file, told in (("labels.txt", [("third", "4")]), ("groups.json", [("a", "10"), ("b", "4")])):
        page = tmp_path / "r.html"
        assert main(["report", str(tmp_path / "s"), f"--groups={tmp_path / file}", f"--out={page}"]) == 0
        part = page.read_text().split('id="groups"')[1].split("</section>")[0]
        found = re.findall(r'<td data-value="([^"]*)">[^<]*</td><td class="right" data-value="([^"]*)">', part)
        assert found == told


def squares(model: Any, batch: Any) -> torch.Tensor:
    return model.net(batch[0]).square().mean(1)


def shown(sample: Any) -> str:
    return f"the sum is {float(sample[0].sum()):.3f}"


def test_errors_are_predicted(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["proxy", str(run / "log"), f"--config={run / 'run.yaml'}", "--target=mean", "--pairs=[[3,0],[30,3]]"]
    assert main([*given, "--lr_factors=[1,2]", "--progress=false", f"--out={run / 'proxy.csv'}"]) == 0
    assert "error / score" in capsys.readouterr().out
    table = pd.read_csv(run / "proxy.csv")
    assert len(table) == 4 and set(table.sample_id) == {3, 30} and set(table.lr_factor) == {1.0, 2.0}


def test_a_run_is_cleaned(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From its configuration alone, which names the callback and with it the log; and nothing is said that was not asked for."""
    config = run / "whole.yaml"
    callback = f"{{class_path: lightning_influence.InfluenceCallback, init_args: {{log: {run / 'log'}}}}}"
    config.write_text(f"trainer:\n  callbacks: [{callback}]\n{(run / 'run.yaml').read_text()}")
    capsys.readouterr()
    asked = ["clean", f"--config={config}", "--progress=false"]
    assert main([*asked, "--dry_run=true", "--k=4", f"--out={run / 'gone.txt'}"]) == 0
    dry = capsys.readouterr()
    assert "predicted_change" in dry.out and "loss_after" not in dry.out
    gone = [int(z) for z in (run / "gone.txt").read_text().split()]
    assert len(gone) == 4
    assert main([*asked, f"--samples={run / 'gone.txt'}", f"--checkpoint_out={run / 'cleaned.ckpt'}"]) == 0
    told = capsys.readouterr()
    table, left_out, written = told.out.rstrip().rsplit("\n", 2)
    assert written == f"wrote {run / 'cleaned.ckpt'}"
    whole, batches = TrainingData.of(Digits()), Digits().val_dataloader()
    theirs = clean(run / "log", queries=batches, model=Net(), data=whole, samples=gone, progress=False)
    assert theirs.model is not None
    for name, value in Net.load_from_checkpoint(run / "cleaned.ckpt").state_dict().items():
        assert torch.equal(value, theirs.model.state_dict()[name]) and not torch.equal(value, Net().state_dict()[name])
    known = [f"--config={config}", f"--checkpoint={run / 'cleaned.ckpt'}", "--curvature=none"]
    with pytest.warns(UserWarning, match="differ from those at the end"):
        assert main(["attribute", str(run / "log"), *known, "--progress=false", f"--out={run / 'c.safetensors'}"]) == 0
    capsys.readouterr()
    assert main([*asked, "--dry_run=true", f"--checkpoint_out={run / 'cleaned.ckpt'}"]) == 2
    assert "which trains nothing" in capsys.readouterr().err
    names, values = (line.split() for line in table.splitlines())
    row = dict(zip(names, map(float, values), strict=True))
    assert row["change"] == pytest.approx(row["loss_after"] - row["loss_before"], abs=1e-5)
    assert row["removed"] == 4 and left_out == "left out: " + " ".join(map(str, gone))
    assert not any(word in told.out + told.err for word in ("GPU", "TPU", "Tip"))
    assert main(["clean", f"--config={run / 'run.yaml'}"]) == 2
    assert "--log missing" in capsys.readouterr().err


def test_horizon_and_rate_are_tuned(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run / "tuning.csv"
    sweep = ["--horizons=[0,2]", "--learning_rates=[0.0001,0.01]", "--max_steps=5", "--keep=0.5", "--proxies=2"]
    assert main(["tune", f"--config={run / 'run.yaml'}", *sweep, f"--out={out}"]) == 0
    told = capsys.readouterr()
    assert "at learning rate 0.01" in told.out, "five steps at 1e-4 learn nothing"
    assert not any(word in told.out + told.err for word in ("GPU", "TPU", "Tip", "max_steps"))
    table = pd.read_csv(out).set_index(["horizon", "lr"])
    assert len(table) == 4
    assert (run / "tuning.png").exists()
    assert table.proxy[2, 1e-2] > table.proxy[2, 1e-4] > 0, "errors grow with the learning rate"
    assert main(["tune", f"--config={run / 'run.yaml'}", "--attribute=speed"]) == 2
    assert "Net has no 'speed'" in capsys.readouterr().err
    assert main(["tune"]) == 2
    assert "--model and --data missing" in capsys.readouterr().err


def test_errors_are_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "none")]) == 1
    told = capsys.readouterr().err
    assert "no such directory" in told and "Traceback" not in told
    assert main(["attribute", str(tmp_path), "--checkpoint=x"]) == 2
    assert "--model and --data missing" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["attribute", "--nonsense"])
    assert stopped.value.code == 2
    with pytest.raises(SystemExit) as helped:
        main(["attribute", "--help"])
    assert helped.value.code == 0
    assert "Example: lightning-influence attribute" in capsys.readouterr().out


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("sub_classes", [True, False])
def test_what_a_lightning_cli_writes_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sub_classes: bool, order: int
) -> None:
    """The file that LightningCLI saves with the run, with classes in it or, as of LightningCLI(Model, Data), without."""
    influence = f"{{class_path: lightning_influence.InfluenceCallback, init_args: {{log: {tmp_path / 'log'}}}}}"
    config = tmp_path / "config.yaml"
    config.write_text(
        f"trainer: {{max_epochs: 1, accelerator: cpu, enable_progress_bar: false, default_root_dir: {tmp_path}, "
        f"callbacks: [{influence}]}}\nmodel: "
        + ("{class_path: test_cli.Net, init_args: {width: 12}}" if sub_classes else "{width: 12}")
        + ("\ndata: {class_path: test_cli.Digits}" if sub_classes else "")
    )
    classes = (None, None) if sub_classes else (Net, Digits)
    trained = LightningCLI(
        *classes, subclass_mode_model=sub_classes, subclass_mode_data=sub_classes, args=["fit", f"--config={config}"]
    )
    saved = next(tmp_path.rglob("version_0/config.yaml"))
    assert "seed_everything" in saved.read_text() and ("class_path: test_cli.Net" in saved.read_text()) == sub_classes
    given = [f"--config={saved}", *([] if sub_classes else ["--model=test_cli.Net", "--data=test_cli.Digits"])]
    checkpoint = [f"--checkpoint={next(tmp_path.rglob('*.ckpt'))}", f"--out={tmp_path / 's.safetensors'}"]
    assert main(["attribute", str(tmp_path / "log"), *given[::order], *checkpoint]) == 0
    assert len(InfluenceReport.load(tmp_path / "s.safetensors").sample_ids) == 40
    assert trained.model.net[0].out_features == 12, "and the checkpoint fits a model of that width alone"
    if not sub_classes:
        capsys.readouterr()
        assert (
            main(["attribute", str(tmp_path / "log"), f"--config={saved}", "--data=test_cli.Digits", *checkpoint]) == 2
        )
        assert "name the class: --model my.Model" in capsys.readouterr().err


def test_a_configuration_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    for text, told in (
        ("trainer: {max_epochs: 1}", "has trainer, but no model or data"),
        ("[1, 2]", "is a list"),
        ("a: [", "is not YAML"),
    ):
        config.write_text(text)
        assert main(["tune", f"--config={config}"]) == 2
        assert told in capsys.readouterr().err
    config.write_text("fit:\n  model: test_cli.Net\n  data: test_cli.Digits\n  trainer: {max_epochs: 1}\n")
    assert main(["attribute", str(tmp_path), f"--config={config}"]) == 2
    assert "--checkpoint missing" in capsys.readouterr().err, "model and data were found"


def script(arguments: list[str], folder: Path) -> None:
    """The installed command called in a folder, which is not on the path of its modules."""
    command = Path(sys.executable).with_name("lightning-influence")
    os.chdir(folder)
    sys.path[:] = [str(command.parent), *(path for path in sys.path if path)]
    sys.argv[:] = [str(command), *arguments]
    runpy.run_path(str(command), run_name="__main__")


def test_modules_of_the_current_directory_are_found(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from test_cli import Digits, Net\n")
    (tmp_path / "config.yaml").write_text("model: mine.Net\ndata: mine.Digits\n")
    code, _, err = Forked(script, ["attribute", "none", "--config=config.yaml"], tmp_path).wait()
    assert code == 2 and "--checkpoint missing" in err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "No such file"),
        (b"nonsense", "is damaged"),
        ({"epoch": 3}, "holds no 'state_dict' (epoch)"),
        ([1], "holds no 'state_dict' (list)"),
        (torch.nn.Linear(2, 2), "holds a torch.nn.modules.linear.Linear"),
        ({"state_dict": Net(width=9).state_dict()}, "give the model the arguments it was trained with"),
        ({"state_dict": {}}, "Missing key(s)"),
        ({"state_dict": {1: torch.ones(1)}}, "does not fit Net"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, told: str
) -> None:
    checkpoint = tmp_path / "last.ckpt"
    if isinstance(content, bytes):
        checkpoint.write_bytes(content)
    elif content is not None:
        torch.save(content, checkpoint)
    given = ["--model=test_cli.Net", "--data=test_cli.Digits", f"--checkpoint={checkpoint}"]
    assert main(["attribute", str(tmp_path / "log"), *given, f"--out={tmp_path / 'out'}"]) == 1
    found = capsys.readouterr().err
    assert "last.ckpt" in found and told in found


def test_wrong_use_is_refused_before_the_work(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = [f"--config={run / 'run.yaml'}", f"--checkpoint={run / 'last.ckpt'}"]
    there = str(run / "log")
    for arguments, told in (
        (["attribute", there, *known, f"--out={run / 'none' / 's.safetensors'}"], "there is no directory"),
        (["attribute", there, *known, f"--out={run}"], "is a directory"),
        (["report", "none", f"--out={run / 'none' / 'r.html'}"], "there is no directory"),
        (["select", "none", f"--out={run / 'none' / 'kept.txt'}"], "there is no directory"),
        (["select", "none", "--keep=1.5"], "--keep 1.5"),
        (["tune", *known[:1], f"--out={run / 'none' / 't.csv'}"], "there is no directory"),
        (["tune", *known[:1], f"--out={run / 't.csv'}", "--learning_rates=[-1]"], "learning_rates=[-1.0]"),
        (["tune", *known[:1], f"--out={run / 't.csv'}", "--proxies=-1"], "proxies=-1"),
        (["check", there, *known, f"--results={run / 'none' / 'r'}"], "there is no directory"),
        (["check", there, *known, "--removals=-3"], "--removals -3; give 3 or more"),
        (["check", there, *known, "--subsets=-3"], "--subsets -3"),
    ):
        assert main(arguments) == 2, arguments
        assert told in capsys.readouterr().err


def test_data_smaller_than_the_report_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = run / "s.safetensors"
    InfluenceReport.from_rows(torch.arange(50), torch.arange(50), torch.randn(50, 1)).save(scores)
    assert main(["report", str(scores), "--data=test_cli.Digits", f"--out={run / 'r.html'}"]) == 2
    assert "data has 40 samples, but sample 49 is in the report" in capsys.readouterr().err


def test_without_jsonargparse_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert main(["inspect", "log"]) == 1
    assert 'pip install "lightning-influence[cli]"' in capsys.readouterr().err


def test_a_manifest_does_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = dict.fromkeys(("optimizer", "compression", "reduction", "precision"), "x")
    rest = {
        "update": "adam",
        "record": "both",
        "frozen_batch_norm": False,
        "mask": {"size": 1, "seed": 0},
        "versions": {},
    }
    whole = {**texts, **rest, "parameters": [], "shapes": {}, "excluded": [], "ranks": 1}
    for number, content in enumerate(
        (
            {**whole, "module": "\x1b[2J\x9bµ", "coverage": {"recorded": 1, "trained": 2000}},
            {**whole, "module": "m", "coverage": {"recorded": "\x1b[2J", "trained": []}},
            {},
        )
    ):
        with StoreWriter(tmp_path / str(number)) as writer:
            writer.write_manifest(content)
        assert main(["inspect", str(tmp_path / str(number))]) == int(number > 0)
        found = capsys.readouterr()
        told = found.out + found.err
        assert "\x1b" not in told and "\x9b" not in told
        assert ("\\x1b[2J\\x9bµ" in told and "1 of 2,000" in told) if number == 0 else "manifest" in told, told


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
      init_args: {{log: {tmp_path / "log"}, record: replay, report: true}}
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


@pytest.mark.parametrize(
    ("make_model", "told"),
    [
        (lambda: Net(), r"called with a learning rate, make_model\(0.001\), and .*too many positional arguments"),
        (lambda lr: Net(), "asked for a learning rate of 0.01, and the optimizer begins at 0.001"),
        (lambda lr: torch.nn.Linear(2, 2), "make_model returned a Linear; it has to return a LightningModule"),
    ],
    ids=["no parameter", "ignores it", "no module"],
)
def test_what_make_model_has_to_take_and_to_give(make_model: Any, told: str) -> None:
    data = Digits()
    held_out = [digits(20).tensors]
    with pytest.raises(ConfigurationError, match=told):
        tune_horizon(
            make_model, data.train_dataloader(), data.val_dataloader(), held_out,
            horizons=(0,), learning_rates=(1e-3, 1e-2), max_steps=2, progress=False, trainer={"accelerator": "cpu"},
        )  # fmt: skip


def test_a_rate_that_is_scaled_and_callbacks_of_one_s_own_are_taken() -> None:
    class Scaled(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([{"params": [p], "lr": 0.1 * self.lr} for p in self.parameters()])

    data, seen = Digits(), list[float]()

    class Looks(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    tune_horizon(
        lambda lr: Scaled(lr=lr), data.train_dataloader(), data.val_dataloader(), [digits(20).tensors],
        horizons=(0,), learning_rates=(1e-3, 1e-2), max_steps=2, progress=False,
        trainer={"accelerator": "cpu", "callbacks": Looks()},
    )  # fmt: skip
    assert seen == [pytest.approx(1e-4), pytest.approx(1e-3)]


def test_horizon_and_learning_rate_are_tuned_together() -> None:
    data = Digits()
    x, y = digits(90).tensors
    held_out = [(x[60:], y[60:])]
    found = tune_horizon(
        lambda lr: Net(lr=lr), data.train_dataloader(), data.val_dataloader(), held_out,
        horizons=(0, 2), learning_rates=(1e-4, 1e-2), max_steps=20, keep=0.5, trainer={"accelerator": "cpu"},
    )  # fmt: skip
    assert found.table.shape == (4, 4) and set(found.table.horizon) == {0, 2}
    assert found.best[1] == 1e-2, "twenty steps at 1e-4 learn nothing"
    assert found.table.loss.min() == found.table.set_index(["horizon", "lr"]).loss[found.best]
    assert found.plot().axes[0].get_title() == "held-out loss"
