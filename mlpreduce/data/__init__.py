"""Images for training and validation."""

from __future__ import annotations

from mlpreduce.data.loaders import Loaders, calibration, load
from mlpreduce.data.settings import AugmentSettings, DataSettings
from mlpreduce.data.sources import check
from mlpreduce.data.surveying import Survey, survey

__all__ = ["AugmentSettings", "DataSettings", "Loaders", "Survey", "calibration", "check", "load", "survey"]
