"""The answer as an object that people read: tables, plots, a page."""

from lightning_influence.report.report import InfluenceReport

__all__ = ["InfluenceReport"]
