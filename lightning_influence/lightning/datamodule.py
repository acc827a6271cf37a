"""The Lightning face of selection: a datamodule that decides, while the model trains, what the next steps see."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import lightning as L
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_influence.capture.step import StepOptions
from lightning_influence.core.sweep import Method
from lightning_influence.errors import ConfigurationError, check_choice
from lightning_influence.lightning.callback import InfluenceCallback
from lightning_influence.lightning.step_selection import RoundSelection, StepSelection
from lightning_influence.report import InfluenceReport
from lightning_influence.report.tables import in_notebook
from lightning_influence.run.lightning_names import is_a, overrides
from lightning_influence.run.random_state import random_state
from lightning_influence.run.ranks import Ranks
from lightning_influence.run.sample_ids import is_map_style
from lightning_influence.run.sample_weights import WeightSource
from lightning_influence.run.trainer import ranks_of
from lightning_influence.scoring.queries import batches_of
from lightning_influence.selection.decisions import SelectionReport
from lightning_influence.selection.loader import SelectingLoader
from lightning_influence.selection.policies import Fraction, Keep, policy_of, stepwise
from lightning_influence.selection.selector import Known, LookAhead, Selector, Settings
from lightning_influence.selection.target import FiniteExamples, Joined, LiveTarget, is_loss_of_module
from lightning_influence.words import renamed

_LOADERS = ("val_dataloader", "test_dataloader", "predict_dataloader")
_BATCH_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def _decisions_of(trainer: L.Trainer) -> Path:
    """Where the decisions of a long run go: into its log, or to a directory of their own under the trainer's root."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, InfluenceCallback) and isinstance(callback.dirpath, Path):
            return callback.dirpath / "decisions"
    return Path(trainer.default_root_dir) / f"selection-{uuid4().hex[:8]}"


class SelectionDataModule(L.LightningDataModule):
    """Wraps a datamodule and keeps, of its training samples, those that help with some queries.

    Selection is scored from the present parameters and optimizer state: a sample's score is the predicted change
    of the target, which is here always the mean loss of the queries, ``horizon`` optimizer steps after the sample's own,
    were the sample removed. With ``horizon=0, every=1`` samples leave the gradient inside the step; otherwise the run is rolled
    out over the candidates, scored by the same sweep as `attribute`, and put back bit for bit. What a removal does to the
    gradient is verified at the first step, or measured (in rounds).

    Everything else is the wrapped datamodule's: its hooks, its state, its attributes.

    Args:
        data: the datamodule, or the training loader itself.
        queries: what the model should become good at, and no test data: in any form that `attribute` takes, or a function
            ``module -> scalar loss``; None for the wrapped datamodule's ``val_dataloader``.
        online_selection: False leaves the wrapped run as it is.
        horizon: optimizer steps between a sample's step and the reading of the target.
        keep: a fraction, ``"positive"``, or a policy (`selection.Policy`).
        every: ``"epoch"``, or optimizer steps between selection rounds.
        per: whether a fraction is kept of every batch or of the whole round.
        rescore: remove in this many portions, each chosen by scores of what the last one left. Scores of single
            removals do not add up, so this selects better where much is removed.
        rebatch: deliver full batches of kept samples, drawing on further passes over the candidates until the
            epoch has as many batches as before; otherwise batches shrink.
        floor: least fraction of a batch that stays whatever the scores.
        not_finite: what to do about queries whose loss is not finite: ``"error"`` names one and ends the run; ``"skip"`` leaves them
            out of the target, warns, and logs their number as ``influence/target_left_out``. It evaluates the loss of every
            query at each reading.
        refresh_target_every: inside the step, all queries are read once in this many optimizer steps; in between, a part of
            them at a time tells how the gradient of the target moves. A function is read at every step.
        coordinates: inside the step, samples are scored on this fraction of the rows of every large parameter, on others at the
            next steps; their scores are extrapolated to all of them.
        curvature: as of `attribute`, where ``"auto"`` is ``"hessian"``, since the steps to come can be run; ``horizon=0``
            needs none.
        response: as of `attribute`, but first order unless asked: a selection needs only the ranking inside a batch, and
            there ``"tangent"`` selects as well at a fraction of the time (docs/benchmarks.md).
        optimizer_assumption: as of `attribute`.
        reduction: as of `InfluenceCallback`.
        sample_weights: as of `InfluenceCallback`.
        exclude: pattern or patterns of parameter names that train and are not looked at; inside the step their gradient
            stays that of the whole batch.
        frozen_batch_norm: as of `InfluenceCallback`.
        verify: as of `InfluenceCallback`; in rounds, removals that disagree are measured instead.
        target: the old word for ``queries``.

    Attributes:
        selector: decides.
        live_target: the gradient of the target, inside the step.
        data: what is wrapped.

    Raises:
        ConfigurationError: choices that do not go together.
    """

    def __init__(
        self,
        data: L.LightningDataModule | DataLoader[Any],
        queries: Any = None,
        *,
        online_selection: bool = True,
        horizon: int = 0,
        keep: Keep = 0.8,
        every: int | Literal["epoch"] = "epoch",
        per: Literal["batch", "round"] = "batch",
        rescore: int = 1,
        rebatch: bool = False,
        floor: float = 0.1,
        not_finite: Literal["error", "skip"] = "error",
        refresh_target_every: int = 10,
        coordinates: float = 0.25,
        curvature: Literal["auto", "none", "fisher", "gauss_newton", "hessian"] = "auto",
        response: Literal["finite", "tangent"] = "tangent",
        optimizer_assumption: Literal["sgd"] | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        sample_weights: WeightSource = None,
        exclude: str | Sequence[str] = (),
        frozen_batch_norm: bool = False,
        verify: bool = True,
        target: Any = None,
    ) -> None:
        super().__init__()
        queries = renamed("queries", queries, "target", target)
        # under its other name, Lightning takes only a datamodule that is an instance of its class of that name, too
        other, own = sys.modules.get("pytorch_lightning"), type(self)
        if other is not None and not issubclass(own, other.LightningDataModule):
            self.__class__ = type(own.__name__, (own, other.LightningDataModule), {"__module__": own.__module__})
        wraps = is_a(data, "LightningDataModule")
        if wraps:
            self.__dict__.clear()  # trainer, hyperparameters and the like are the wrapped datamodule's
        self.online_selection = online_selection
        check_choice("not_finite", not_finite, ("error", "skip"))
        self._skips = not_finite == "skip"
        self.live_target = LiveTarget(refresh_target_every)
        self._queries = queries  # as given
        self._batches: Any = None  # as they are read
        self._generator: torch.Generator | None = None  # by which selection in rounds draws
        self._resumed_generator: Tensor | None = None
        policy = policy_of(keep)
        policy = Fraction(policy.fraction, per) if isinstance(policy, Fraction) else policy
        method = Method(
            "none" if not horizon else "hessian" if curvature == "auto" else curvature,
            response,
            memory_window=min(8, max(0, horizon)),
            optimizer_assumption=optimizer_assumption,
        )
        settings = Settings(
            stepwise(policy, rescore),
            method,
            horizon,
            every,
            rebatch,
            floor,
            StepOptions(reduction, sample_weights, exclude, frozen_batch_norm, verify),
            coordinates,
        )
        self.selector = Selector(settings, None if settings.every_step else LookAhead(self._query_batches, settings))
        for name in (*_LOADERS, *_BATCH_HOOKS):
            if wraps and overrides(data, name):
                self.__dict__[name] = getattr(data, name)
            elif name in _LOADERS:  # Lightning then leaves validation, say, out
                self.__dict__[name] = None
        self.__dict__["data"] = data

    @classmethod
    def from_report(
        cls, data: L.LightningDataModule | DataLoader[Any], report: InfluenceReport, *, keep: Keep = 0.8, **options: Any
    ) -> SelectionDataModule:
        """Offline selection: the scores are those of a report, averaged over its queries, at every epoch.

        Args:
            options: as of the class. Samples that the report does not score are kept.
        """
        selected = cls(data, keep=keep, **options)
        scores = dict(zip(report.sample_ids.tolist(), report.scores.mean(1).tolist(), strict=True))
        selected.selector = Selector(selected.selector.settings, Known(scores))
        selected.online_selection = True
        return selected

    @property
    def selection_report(self) -> SelectionReport:
        """What was decided so far."""
        return self.selector.report

    # -- the wrapped datamodule -------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """What this does not have is the wrapped datamodule's."""
        if self._is_passed_on(name):
            return getattr(self.__dict__["data"], name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        own = name in self.__dict__ or hasattr(type(self), name)
        if not own and self._is_passed_on(name):
            setattr(self.__dict__["data"], name, value)
        else:
            super().__setattr__(name, value)

    def _is_passed_on(self, name: str) -> bool:
        data = self.__dict__.get("data")
        return is_a(data, "LightningDataModule") and not name.startswith("__") and hasattr(data, name)

    @property
    def _selects(self) -> bool:
        """Whether a run asks; outside of one this is the wrapped datamodule."""
        return self.online_selection and self.trainer is not None and self.trainer.state.status == "running"

    def prepare_data(self) -> None:
        if is_a(self.data, "LightningDataModule"):
            self.data.prepare_data()

    def setup(self, stage: str) -> None:
        if is_a(self.data, "LightningDataModule"):
            self.data.setup(stage)
        if stage != "fit" or not self._selects:
            return
        assert self.trainer is not None
        ranks = ranks_of(self.trainer)
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        self.selector.report.go_to(_decisions_of(self.trainer) / f"rank-{ranks.rank}.bin")
        scorer = self.selector.scorer
        if scorer is not None:
            if isinstance(scorer, LookAhead):
                scorer.forget()  # another run, perhaps of another module
            if scorer.reads_batches:
                callbacks.append(RoundSelection(self.selector.settings.options))
            return
        if any(isinstance(c, InfluenceCallback) for c in callbacks):
            raise ConfigurationError(
                "InfluenceCallback records the gradient of whole batches, and horizon=0, every=1 takes samples out of "
                "it. Record with every='epoch', or without selection."
            )
        callbacks.append(StepSelection(self.selector, self.live_target, self._query_batches))

    def teardown(self, stage: str) -> None:
        if is_a(self.data, "LightningDataModule"):
            self.data.teardown(stage)
        self._leave()
        if self.trainer is not None and stage == "fit" and self.online_selection:
            self.selector.report = SelectionReport.merged(ranks_of(self.trainer).gather(self.selector.report))

    def on_exception(self, exception: BaseException) -> None:
        if is_a(self.data, "LightningDataModule"):
            self.data.on_exception(exception)
        self._leave()

    def _leave(self) -> None:
        """Take the callback of selection away from the trainer; its own teardown would come after the datamodule's."""
        self._batches = None
        if self.trainer is None:
            return
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        for callback in [c for c in callbacks if isinstance(c, (StepSelection, RoundSelection))]:
            callbacks.remove(callback)
            callback.leave(self.trainer)

    def train_dataloader(self) -> Any:
        loader = self.data.train_dataloader() if is_a(self.data, "LightningDataModule") else self.data
        if not self._selects:
            return loader
        if not is_map_style(loader):
            raise ConfigurationError(
                f"the training data is a {type(loader).__name__} of {type(getattr(loader, 'dataset', None)).__name__}; "
                "selection draws samples by their indices, so it needs a DataLoader of a map-style dataset with batches."
            )
        if self.selector.inside_the_step:
            return loader
        assert self.trainer is not None
        self._draw_on(loader.generator)
        return SelectingLoader(self.selector, loader, self.trainer)

    def _draw_on(self, generator: torch.Generator | None) -> None:
        """Draw the next epoch of a resumed run as it would have been drawn without the interruption.

        Lightning gives a loader its state back only inside an epoch. From a checkpoint of an epoch's end, a seeded generator
        would begin again with the order of the first epoch.
        """
        self._generator, state, self._resumed_generator = generator, self._resumed_generator, None
        if generator is not None and state is not None:
            generator.set_state(state)

    def _query_batches(self) -> Any:
        """The queries as `lookahead.look_ahead` takes them.

        Raises:
            ConfigurationError: there are none.
        """
        if is_loss_of_module(self._queries):
            return self._queries
        if self._batches is None:
            with random_state(None):  # a loader that is made may draw random numbers
                given = self._given_queries()
            if given is None or (isinstance(given, Joined) and not given.loaders):
                raise ConfigurationError(
                    "selection needs a target: give queries= a loader of held-out examples, or a datamodule with "
                    "val_dataloader."
                )
            self._batches = given
            if self._skips and self.trainer is not None:
                self._batches = FiniteExamples(given, self.trainer.lightning_module, self._tell_left_out)
        return self._batches

    def _tell_left_out(self, n: int) -> None:
        """Queries were left out of the target."""
        assert self.trainer is not None
        warnings.warn(
            f"{n} examples of the target have a loss that is not finite, and are left out of it.", stacklevel=2
        )
        for logger in self.trainer.loggers:
            logger.log_metrics({"influence/target_left_out": n}, self.trainer.global_step)

    def _given_queries(self) -> Any:
        if self._queries is None and self.val_dataloader is not None:
            loaders = self.val_dataloader()
            return Joined(tree_leaves(getattr(loaders, "iterables", loaders)))  # of a CombinedLoader
        given = self._queries
        if given is not None and not isinstance(given, DataLoader):
            given = batches_of(given)
        return Joined([given]) if isinstance(given, DataLoader) else given

    def __repr__(self) -> str:
        settings = self.selector.settings
        portions = f"{len(settings.portions)} times " if len(settings.portions) > 1 else ""
        how = f"horizon={settings.horizon}, every={settings.every!r}, {portions}{settings.portions[0]!r}"
        known = isinstance(self.selector.scorer, Known)
        what = "scores of a report" if known else how if self.online_selection else "off"
        return f"{type(self).__name__}({type(self.data).__name__}; selection: {what}; {self.selection_report!r})"

    __str__ = __repr__  # Lightning's own asks for every loader

    def _repr_html_(self) -> str:
        return in_notebook(repr(self), self.selection_report.to_pandas())

    def state_dict(self) -> dict[str, Any]:
        ranks = Ranks() if self.trainer is None else ranks_of(self.trainer)
        return {
            "decisions": ranks.gather(self.selector.report.state_dict()),
            "target": self.live_target.state_dict(),
            "generator": None if self._generator is None else self._generator.get_state(),
            "data": self.data.state_dict() if is_a(self.data, "LightningDataModule") else {},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("data"):
            self.data.load_state_dict(state_dict["data"])
        self.live_target.load_state_dict(state_dict["target"])
        self._resumed_generator = state_dict.get("generator")  # which earlier versions did not keep
        decisions = state_dict["decisions"]
        rank = 0 if self.trainer is None else self.trainer.global_rank
        self.selector.report = self.selector.report.restored(decisions[rank] if rank < len(decisions) else [])
