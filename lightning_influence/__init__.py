"""Which training samples helped or hurt a model, for runs of PyTorch Lightning."""

from lightning_influence.attribution import attribute
from lightning_influence.callback import InfluenceCallback
from lightning_influence.datamodule import SelectionDataModule
from lightning_influence.errors import InfluenceError
from lightning_influence.faithfulness import check_faithfulness
from lightning_influence.proxy import error_proxy
from lightning_influence.report import InfluenceReport
from lightning_influence.tuning import tune_horizon

__version__ = "0.1.0"

__all__ = [
    "InfluenceCallback",
    "InfluenceError",
    "InfluenceReport",
    "SelectionDataModule",
    "attribute",
    "check_faithfulness",
    "error_proxy",
    "tune_horizon",
]
