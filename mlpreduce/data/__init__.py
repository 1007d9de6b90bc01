"""Images for training and validation."""

from __future__ import annotations

from mlpreduce.data.loaders import Loaders, calibration, load
from mlpreduce.data.settings import AugmentSettings, DataSettings
from mlpreduce.data.sources import check

__all__ = ["AugmentSettings", "DataSettings", "Loaders", "calibration", "check", "load"]
