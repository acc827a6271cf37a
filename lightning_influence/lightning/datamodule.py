"""The Lightning face of selection: a datamodule that decides, while the model trains, what the next steps see."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_influence.core.sweep import Method
from lightning_influence.errors import ConfigurationError
from lightning_influence.lightning.callback import InfluenceCallback
from lightning_influence.lightning.step_selection import StepSelection
from lightning_influence.report import InfluenceReport
from lightning_influence.report.tables import in_notebook
from lightning_influence.run.lightning_names import is_a, overrides
from lightning_influence.run.ranks import Ranks
from lightning_influence.run.sample_ids import is_map_style
from lightning_influence.selection.decisions import SelectionReport
from lightning_influence.selection.loader import SelectingLoader
from lightning_influence.selection.lookahead import Candidates, look_ahead
from lightning_influence.selection.policies import Fraction, Keep, Policy, Soft, decide, policy_of, stepwise
from lightning_influence.selection.target import LiveTarget

_PASSED_ON = ("val_dataloader", "test_dataloader", "predict_dataloader")


class SelectionDataModule(L.LightningDataModule):
    """Wraps a datamodule and keeps, of its training samples, those that help a target.

    Selection is scored from the present parameters and optimizer state: a sample's score is the predicted change
    of the target loss, ``horizon`` optimizer steps after the sample's own, were the sample removed (method.md
    section 8). With ``horizon=0, every=1`` samples leave the gradient inside the step; otherwise the run is rolled
    out over the candidates, scored by the same sweep as `attribute`, and put back bit for bit.

    Args:
        data: the datamodule, or the training loader itself.
        target: what the model should become good at: a loader of held-out examples that are not test data, or a
            function ``module -> scalar loss``; None for the wrapped datamodule's ``val_dataloader``.
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
        refresh_target_every: inside the step, optimizer steps in which the whole target is read once; in between, a part of
            it at a time tells how its gradient moves. A function is read at every step.
        curvature: as of `attribute`; ``horizon=0`` needs none.
        optimizer_assumption: as of `attribute`.
        response: as of `attribute`; first order unless asked, which selects as well at a fraction of the time
            (docs/benchmarks.md).

    Attributes:
        selection_report: what was decided so far.

    Raises:
        ConfigurationError: choices that do not go together.
    """

    def __init__(
        self,
        data: L.LightningDataModule | DataLoader[Any],
        target: Any = None,
        *,
        online_selection: bool = True,
        horizon: int = 0,
        keep: Keep = 0.8,
        every: int | Literal["epoch"] = "epoch",
        per: Literal["batch", "round"] = "batch",
        rescore: int = 1,
        rebatch: bool = False,
        floor: float = 0.1,
        refresh_target_every: int = 10,
        curvature: Literal["none", "fisher", "hessian"] = "hessian",
        response: Literal["finite", "tangent"] = "tangent",
        optimizer_assumption: Literal["sgd"] | None = None,
    ) -> None:
        super().__init__()
        # under its other name, Lightning takes only a datamodule that is an instance of its class of that name, too
        other, own = sys.modules.get("pytorch_lightning"), type(self)
        if other is not None and not issubclass(own, other.LightningDataModule):
            self.__class__ = type(own.__name__, (own, other.LightningDataModule), {"__module__": own.__module__})
        self.data: Any = data
        self.target, self.online_selection = target, online_selection
        self.horizon, self.every, self.rebatch, self.floor = horizon, every, rebatch, floor
        self.live_target = LiveTarget(refresh_target_every)  # inside the step
        self.selection_report = SelectionReport()
        self._check()
        policy = policy_of(keep)
        self.policy = Fraction(policy.fraction, per) if isinstance(policy, Fraction) else policy
        if isinstance(self.policy, Soft) and not self.inside_the_step:
            raise ConfigurationError("Soft weighs gradients, which horizon=0, every=1 does; a batch has no weights.")
        self.portions: Sequence[Policy] = stepwise(self.policy, rescore)
        self.method = Method(
            curvature if horizon else "none",
            response,
            memory_window=min(8, horizon),
            optimizer=optimizer_assumption,
        )
        self._offline: InfluenceReport | None = None
        for name in _PASSED_ON:  # what is not there is not defined: Lightning then leaves validation, say, out
            defined = is_a(data, "LightningDataModule") and overrides(data, name)
            setattr(self, name, getattr(data, name) if defined else None)

    @classmethod
    def from_report(
        cls, data: L.LightningDataModule | DataLoader[Any], report: InfluenceReport, *, keep: Keep = 0.8, **options: Any
    ) -> SelectionDataModule:
        """Offline selection: the scores are those of a report, averaged over its queries, at every epoch.

        Args:
            options: as of the class. Samples that the report does not score are kept.
        """
        selected = cls(data, keep=keep, **options)
        selected._offline = report
        return selected

    def _check(self) -> None:
        for name, value, least in (
            ("horizon", self.horizon, 0),
            ("refresh_target_every", self.live_target.every, 1),
        ):
            if value < least:
                raise ConfigurationError(f"{name}={value}; it counts optimizer steps and is at least {least}.")
        if self.every != "epoch" and (isinstance(self.every, str) or self.every < 1):
            raise ConfigurationError(f"every={self.every!r}; give 'epoch' or a number of optimizer steps from 1.")
        if not 0 <= self.floor <= 1:
            raise ConfigurationError(f"floor={self.floor}; it is a fraction of a batch, from 0 to 1.")
        if self.inside_the_step and self.rebatch:
            raise ConfigurationError("rebatch=True fills batches, but horizon=0, every=1 selects inside the step.")

    @property
    def inside_the_step(self) -> bool:
        """Whether samples leave the gradient instead of the batch."""
        return self.horizon == 0 and self.every == 1

    # -- the wrapped datamodule -------------------------------------------------------------------------

    def prepare_data(self) -> None:
        if is_a(self.data, "LightningDataModule"):
            self.data.prepare_data()

    def setup(self, stage: str) -> None:
        if is_a(self.data, "LightningDataModule"):
            self.data.trainer = self.trainer
            self.data.setup(stage)
        if stage != "fit" or not self._selects or self.trainer is None:
            return
        Ranks.of(self.trainer)
        if self.inside_the_step and self._offline is None:
            if any(isinstance(c, InfluenceCallback) for c in self.trainer.callbacks):  # type: ignore[attr-defined]
                raise ConfigurationError(
                    "InfluenceCallback records the gradient of whole batches, and horizon=0, every=1 takes samples out of "
                    "it. Record with every='epoch', or without selection."
                )
            self.trainer.callbacks.append(StepSelection(self))  # type: ignore[attr-defined]

    def teardown(self, stage: str) -> None:
        if is_a(self.data, "LightningDataModule"):
            self.data.teardown(stage)
        if self.trainer is not None:
            callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
            callbacks[:] = [c for c in callbacks if not isinstance(c, StepSelection)]
            if stage == "fit" and self._selects:
                parts = Ranks.of(self.trainer).gather(self.selection_report)
                self.selection_report = SelectionReport.merged(parts)

    def train_dataloader(self) -> Any:
        loader = self.data.train_dataloader() if is_a(self.data, "LightningDataModule") else self.data
        if not self._selects:
            return loader
        if not is_map_style(loader):
            raise ConfigurationError(
                f"the training data is a {type(loader).__name__} of {type(getattr(loader, 'dataset', None)).__name__}; "
                "selection draws samples by their indices, so it needs a DataLoader of a map-style dataset with batches."
            )
        if self.inside_the_step and self._offline is None:
            return loader
        assert self.trainer is not None
        return SelectingLoader(self, loader, Ranks.of(self.trainer))

    @property
    def _selects(self) -> bool:
        return self.online_selection or self._offline is not None

    # -- scores and decisions ---------------------------------------------------------------------------

    def target_batches(self) -> Any:
        """The target as `lookahead.look_ahead` takes it.

        Raises:
            ConfigurationError: there is none.
        """
        if self.target is not None:
            return self.target
        if self.val_dataloader is not None:
            loader = self.val_dataloader()
            if isinstance(loader, Iterable) and not (isinstance(loader, list) and not loader):
                return loader
        raise ConfigurationError(
            "selection needs a target: give target= a loader of held-out examples, or a datamodule with val_dataloader."
        )

    def round_scores(self, candidates: Sequence[Sequence[Candidates]], scored: int) -> list[Tensor]:
        """Scores ``(n,)`` of the next ``scored`` steps, each step a list of micro-batches."""
        assert self.trainer is not None
        if self._offline is not None:
            known = dict(zip(self._offline.sample_ids.tolist(), self._offline.scores.mean(1).tolist(), strict=True))
            ids = [torch.cat([c.sample_ids for c in step]).tolist() for step in candidates[:scored]]
            return [torch.tensor([known.get(z, torch.inf) for z in step]) for step in ids]
        return look_ahead(self.trainer, candidates, self.target_batches(), self.horizon, self.method, scored)

    def decide(
        self, policy: Policy, scores: Tensor, sample_ids: Tensor, batches: Tensor, left: Tensor | None = None
    ) -> Tensor:
        """Weights ``(n,)`` of one portion; what is not ``left`` stays away."""
        left = torch.ones(len(scores), dtype=torch.bool) if left is None else left
        weights = torch.zeros(len(scores))
        weights[left] = decide(policy, scores[left].float(), sample_ids[left], batches[left], self.floor)
        return weights

    def note(self, trainer: L.Trainer, sample_ids: Tensor, scores: Tensor, weights: Tensor) -> None:
        """Keep a decision, and log it through the trainer's loggers."""
        self.selection_report.add(trainer.global_step, sample_ids, scores, weights)
        every = trainer.log_every_n_steps if self.inside_the_step else 1  # type: ignore[attr-defined]
        if trainer.global_step % every == 0:
            told = {"selection/kept": float(weights.mean()), "selection/score": float(scores[scores.isfinite()].mean())}
            for logger in trainer.loggers:
                logger.log_metrics(told, trainer.global_step)

    def __repr__(self) -> str:
        how = f"horizon={self.horizon}, every={self.every!r}, {self.policy!r}"
        what = "scores of a report" if self._offline is not None else how if self.online_selection else "off"
        return f"{type(self).__name__}({type(self.data).__name__}; selection: {what}; {self.selection_report!r})"

    __str__ = __repr__  # Lightning's own asks for every loader

    def _repr_html_(self) -> str:
        return in_notebook(repr(self), self.selection_report.to_pandas())

    def state_dict(self) -> dict[str, Any]:
        ranks = Ranks() if self.trainer is None else Ranks.of(self.trainer)
        return {"decisions": ranks.gather(self.selection_report.rows), "target": self.live_target.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.live_target.load_state_dict(state_dict["target"])
        decisions = state_dict["decisions"]
        rank = 0 if self.trainer is None else self.trainer.global_rank
        self.selection_report = SelectionReport(list(decisions[rank]) if rank < len(decisions) else [])
