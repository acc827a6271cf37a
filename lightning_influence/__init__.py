"""Which training samples helped or hurt a model, for runs of PyTorch Lightning."""

from lightning_influence.errors import InfluenceError
from lightning_influence.lightning.callback import InfluenceCallback
from lightning_influence.lightning.datamodule import SelectionDataModule
from lightning_influence.lightning.tuning import tune_horizon
from lightning_influence.report import InfluenceReport
from lightning_influence.scoring.attribution import attribute
from lightning_influence.scoring.tokens import token_scores
from lightning_influence.trust.dynamics import suspects, training_dynamics
from lightning_influence.trust.error_proxy import error_proxy
from lightning_influence.trust.faithfulness import check_faithfulness

__version__ = "0.1.0"

__all__ = [
    "InfluenceCallback",
    "InfluenceError",
    "InfluenceReport",
    "SelectionDataModule",
    "attribute",
    "check_faithfulness",
    "error_proxy",
    "suspects",
    "token_scores",
    "training_dynamics",
    "tune_horizon",
]
