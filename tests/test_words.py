"""One word for one thing in every verb and on the command line; the old words work, warn, and exclude the new ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from modules import Classifier, digits, fit
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import (
    InfluenceCallback,
    SelectionDataModule,
    attribute,
    check_faithfulness,
    clean,
    cli,
    error_proxy,
    suspects,
    token_scores,
    training_dynamics,
    tune_horizon,
)
from lightning_influence.core.sweep import Method
from lightning_influence.errors import ConfigurationError

VERBS: dict[str, Callable[..., Any]] = {
    verb.__name__: verb
    for verb in (
        InfluenceCallback, attribute, error_proxy, check_faithfulness, token_scores, clean, suspects, training_dynamics,
        SelectionDataModule, tune_horizon,
    )
}  # fmt: skip
READERS = ("attribute", "error_proxy", "check_faithfulness")
ASKERS = (*READERS, "token_scores", "clean")
"""All that take a log and queries; those that are no readers have defaults of their own, and say why."""
ORDER = (
    "log", "queries", "model", "data", "target", "curvature", "response", "memory_window", "counterfactual",
    "optimizer_assumption", "query_loss",
)  # fmt: skip
COMMANDS = {
    cli.attribute: attribute,
    cli.check: check_faithfulness,
    cli.clean: clean,
    cli.dynamics: training_dynamics,
    cli.proxy: error_proxy,
    cli.suspects: suspects,
    cli.tokens: token_scores,
    cli.tune: tune_horizon,
}
OF_THE_COMMAND_LINE = {
    "model",
    "data",
    "checkpoint",
    "checkpoint_out",
    "out",
    "groups_out",
    "attr_name",
    "keep",
    "scores",
}  # keep is one of tune_horizon's **selection


def arguments(verb: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(verb).parameters)


def held_out() -> DataLoader[Any]:
    x, y = digits(60).tensors
    return DataLoader(TensorDataset(x[40:], y[40:]), 10)


class Digits(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(digits(40), 8)

    def val_dataloader(self) -> Any:
        return held_out()


def decided(data: SelectionDataModule) -> list[Any]:
    return [(step, ids.tolist(), weights.tolist()) for step, ids, _, weights in data.selection_report.rows]


# -- the same word, the same default ---------------------------------------------------------------------


@pytest.mark.parametrize("verb", [*READERS, "command line attribute", "command line check"])
def test_defaults_are_those_of_attribute(verb: str) -> None:
    own = arguments(VERBS[verb] if verb in VERBS else getattr(cli, verb.split()[-1]))
    known = {"target": None, "response": "finite", "curvature": "auto", "memory_window": 8, "counterfactual": "drop"}
    shared = known.keys() & own.keys()
    assert {"target", "counterfactual"} <= shared
    assert {name: own[name].default for name in shared} == {name: known[name] for name in shared}


@pytest.mark.parametrize("name", ["response", "memory_window", "counterfactual", "optimizer_assumption"])
def test_the_sweep_has_the_words_and_defaults_of_attribute(name: str) -> None:
    assert arguments(Method)[name].default == arguments(attribute)[name].default


@pytest.mark.parametrize("verb", VERBS)
def test_words_come_in_one_order(verb: str) -> None:
    own = [name for name in arguments(VERBS[verb]) if name in ORDER]
    if verb in ASKERS:
        assert own == [name for name in ORDER if name in own]
    assert own, "at least one word is shared"


@pytest.mark.parametrize("verb", [*ASKERS, "SelectionDataModule", "tune_horizon"])
def test_held_out_data_is_called_queries(verb: str) -> None:
    assert "queries" in arguments(VERBS[verb])


@pytest.mark.parametrize("verb", ["InfluenceCallback", *ASKERS, "suspects", "training_dynamics"])
def test_the_directory_of_a_log_comes_first_and_is_called_log(verb: str) -> None:
    assert next(iter(arguments(VERBS[verb]))) == "log"


def test_token_scores_have_the_words_of_attribute_and_say_why_two_defaults_differ() -> None:
    own, whole = arguments(token_scores), arguments(attribute)
    differing = {name for name in own.keys() & whole.keys() if own[name].default != whole[name].default}
    assert differing == {"samples", "target", "curvature"}
    assert (
        "one number a token" in (token_scores.__doc__ or "") and 'which ``"auto"`` stands for' in token_scores.__doc__
    )


def test_selection_has_the_words_of_attribute_and_says_why_its_response_differs() -> None:
    own, whole = arguments(SelectionDataModule), arguments(attribute)
    assert own["curvature"].default == whole["curvature"].default
    assert own["optimizer_assumption"].default == whole["optimizer_assumption"].default
    assert own["response"].default == "tangent" and "fraction of the time" in (SelectionDataModule.__doc__ or "")


def test_selection_reads_a_step_by_the_words_of_the_recorder() -> None:
    for name in ("reduction", "sample_weights", "exclude", "frozen_batch_norm"):
        assert arguments(SelectionDataModule)[name].default == arguments(InfluenceCallback)[name].default


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_options_are_the_words_of_the_verb(command: Callable[..., Any]) -> None:
    options, own = (current(of) for of in (command, COMMANDS[command]))
    assert options - OF_THE_COMMAND_LINE <= own
    method = {"target", "curvature", "response", "memory_window", "counterfactual", "optimizer_assumption"}
    assert own & method == options & method


def current(verb: Callable[..., Any]) -> set[str]:
    """The arguments of a verb but for its old words, which its docstring names."""
    return {name for name in arguments(verb) if f"{name}: the old word for" not in (verb.__doc__ or "")}


# -- the old words ---------------------------------------------------------------------------------------


def old_word(new: str, old: str) -> Any:
    return pytest.warns(
        DeprecationWarning, match=f"{old} is the old word for {new} and goes in 1.0; give {new} instead"
    )


def test_dirpath_is_an_old_word_for_log(tmp_path: Path) -> None:
    with old_word("log", "dirpath") as warned:
        callback = InfluenceCallback(dirpath=tmp_path / "log", record="replay")
    assert [Path(w.filename).name for w in warned] == ["test_words.py"], "once, at the line that used it"
    assert callback.dirpath == InfluenceCallback(tmp_path / "log").dirpath == tmp_path / "log"
    assert callback.state_key == InfluenceCallback(log=tmp_path / "log").state_key, "checkpoints are found as before"
    fit(Classifier(), DataLoader(digits(8), 4), callback)
    assert (tmp_path / "log" / "manifest.json").exists()
    with pytest.raises(ConfigurationError, match="log and dirpath are both given"):
        InfluenceCallback(tmp_path, dirpath=tmp_path)
    with pytest.raises(ConfigurationError, match="log is missing"):
        InfluenceCallback()


def test_target_is_an_old_word_for_the_queries_of_selection() -> None:
    with old_word("queries", "target"):
        old = SelectionDataModule(DataLoader(digits(40), 8), target=held_out(), every=1, keep=0.5)
    new = SelectionDataModule(DataLoader(digits(40), 8), queries=held_out(), every=1, keep=0.5)
    for data in (old, new):
        fit(Classifier(), data)
    assert decided(old) == decided(new) != []
    with pytest.raises(ConfigurationError, match="queries and target are both given"):
        SelectionDataModule(DataLoader(digits(40), 8), held_out(), target=held_out())


def test_target_is_an_old_word_for_the_queries_of_tuning() -> None:
    options = {"horizons": (0,), "learning_rates": (1e-3,), "max_steps": 2, "trainer": {"accelerator": "cpu"}}
    given = (lambda lr: Classifier(), DataLoader(digits(16), 8))
    with old_word("queries", "target"):
        old = tune_horizon(*given, target=held_out(), held_out=held_out(), **options)
    new = tune_horizon(*given, queries=held_out(), held_out=held_out, **options)
    assert old.table.shape == new.table.shape
    with pytest.raises(ConfigurationError, match="queries and target are both given"):
        tune_horizon(*given, held_out(), held_out(), target=held_out(), **options)
    with pytest.raises(ConfigurationError, match="held_out is missing"):
        tune_horizon(*given, held_out(), **options)


# -- one set of forms ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    {
        "loader": held_out,
        "list of batches": lambda: list(held_out()),
        "datamodule": Digits,
        "dataset": lambda: held_out().dataset,
        "method": lambda: Digits().val_dataloader,
    }.items(),
    ids=lambda item: item[0],
)
@pytest.mark.parametrize("every", [1, "epoch"])
def test_selection_takes_queries_in_every_form(form: tuple[str, Callable[[], Any]], every: Any) -> None:
    options = {"every": every, "keep": 0.5, "refresh_target_every": 1}
    chosen = []
    for queries in (list(held_out()), form[1]()):
        data = SelectionDataModule(DataLoader(digits(40), 8), queries, **options)
        fit(Classifier(), data, precision="64-true")
        chosen.append(decided(data))
    assert chosen[0] == chosen[1] != []


@pytest.mark.parametrize("record", ["gradients", "replay"])
def test_the_target_is_the_same_for_every_verb_that_reads_a_log(tmp_path: Path, record: str) -> None:
    """Scores are linear in the query losses, so a weighted target is the weighted sum of each query's own column."""
    x, y = digits(43).tensors
    queries, weights = [(x[40:], y[40:])], [0.5, -1.0, 2.0]
    module, train = Classifier(), DataLoader(digits(40), 8)
    fit(module, train, InfluenceCallback(tmp_path, record=record))
    options = {"queries": queries, "model": module, "data": train, "progress": False}
    pairs = [(0, 0), (9, 1), (20, 2)]
    each, summed = (error_proxy(tmp_path, target=t, pairs=pairs, **options).proxies[1.0] for t in (None, weights))
    expected = each.total.double() @ torch.tensor(weights).double()[:, None]
    torch.testing.assert_close(summed.total.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    with pytest.raises(ConfigurationError, match="target='median'"):
        error_proxy(tmp_path, target="median", **options)
    if record == "replay":
        asks = {"removals": [0, 9, 20], "ceiling": False, "dtype": None, **options}
        each, summed = (check_faithfulness(tmp_path, target=t, **asks) for t in (None, weights))
        torch.testing.assert_close(
            summed.truth, each.truth @ torch.tensor(weights).double()[:, None], rtol=0, atol=1e-6
        )
        with pytest.raises(ConfigurationError, match="target='median'"):
            check_faithfulness(tmp_path, target="median", **asks)


# -- the command line ------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--target=each", "--target=mean", None])
def test_old_options_work(tmp_path: Path, option: str | None) -> None:
    from lightning_influence import InfluenceReport

    module = Net()
    trainer = fit(module, Digits().train_dataloader(), InfluenceCallback(tmp_path / "log"))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    out = tmp_path / "s.safetensors"
    given = ["--model=test_words.Net", "--data=test_words.Digits", f"--checkpoint={tmp_path / 'last.ckpt'}"]
    command = ["attribute", str(tmp_path / "log"), *given, f"--out={out}", *([option] if option else [])]
    if option == "--target=each":
        with pytest.warns(FutureWarning, match="--target each is the old word for --target null"):
            assert cli.main(command) == 0
    else:
        assert cli.main(command) == 0
    assert InfluenceReport.load(out).scores.shape == (40, 1 if option == "--target=mean" else 20)


class Net(Classifier):
    lr = 1e-3

    def __init__(self, width: int = 8) -> None:
        super().__init__(width=width)


def test_attribute_is_an_old_option_of_tune(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["tune", "--model=test_words.Net", "--data=test_words.Digits"]
    with pytest.warns(FutureWarning, match="--attribute is the old word for --attr_name"):
        assert cli.main([*given, "--attribute=speed"]) == 2
    assert "Net has no 'speed'" in capsys.readouterr().err
    assert cli.main([*given, "--attribute=lr", "--attr_name=lr"]) == 2
    assert "--attr_name and --attribute are both given" in capsys.readouterr().err


def test_the_command_line_says_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_influence import __version__

    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out.split() == ["lightning-influence", __version__]
