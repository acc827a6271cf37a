"""Which training samples helped or hurt a model, for runs of PyTorch Lightning and for loops of one's own."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_influence.errors import InfluenceError
    from lightning_influence.lightning.callback import InfluenceCallback
    from lightning_influence.lightning.datamodule import SelectionDataModule
    from lightning_influence.lightning.tuning import tune_horizon
    from lightning_influence.live.loop import recording
    from lightning_influence.report import InfluenceReport
    from lightning_influence.report.comparison import compare
    from lightning_influence.run.left_out import without
    from lightning_influence.run.task import FunctionTask
    from lightning_influence.scoring.attribution import attribute
    from lightning_influence.scoring.tokens import token_scores
    from lightning_influence.trust.cleaning import clean
    from lightning_influence.trust.dynamics import suspects, training_dynamics
    from lightning_influence.trust.error_proxy import error_proxy
    from lightning_influence.trust.faithfulness import check_faithfulness

__version__ = "0.1.0"

__all__ = [
    "FunctionTask",
    "InfluenceCallback",
    "InfluenceError",
    "InfluenceReport",
    "SelectionDataModule",
    "attribute",
    "check_faithfulness",
    "clean",
    "compare",
    "error_proxy",
    "recording",
    "suspects",
    "token_scores",
    "training_dynamics",
    "tune_horizon",
    "without",
]

_HOMES = {
    "FunctionTask": "run.task",
    "InfluenceCallback": "lightning.callback",
    "InfluenceError": "errors",
    "InfluenceReport": "report",
    "SelectionDataModule": "lightning.datamodule",
    "attribute": "scoring.attribution",
    "check_faithfulness": "trust.faithfulness",
    "clean": "trust.cleaning",
    "compare": "report.comparison",
    "error_proxy": "trust.error_proxy",
    "recording": "live.loop",
    "suspects": "trust.dynamics",
    "token_scores": "scoring.tokens",
    "training_dynamics": "trust.dynamics",
    "tune_horizon": "lightning.tuning",
    "without": "run.left_out",
}
"""Where the public names live; a name is imported when it is first used, so a saved report is read without the rest."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
