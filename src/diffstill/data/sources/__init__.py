"""Where images come from: one declarative spec, five kinds of source, three stratified splits in memory."""

from .load import load_data, whole_source
from .spec import DataSpec
from .splits import DataSplits

__all__ = ["DataSpec", "DataSplits", "load_data", "whole_source"]
