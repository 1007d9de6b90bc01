"""Images for training and validation."""

from __future__ import annotations

from mlpreduce.data.loaders import Loaders, check, load
from mlpreduce.data.settings import AugmentSettings, DataSettings

__all__ = ["AugmentSettings", "DataSettings", "Loaders", "check", "load"]
