"""Source and target data sets as memory-mapped uint8 arrays, and the class splits of meta-training."""

from metaperturb.data.arrays import ImageArrays
from metaperturb.data.registry import load
from metaperturb.data_sets import DATA_SETS, SOURCES, DataSet

__all__ = ["DATA_SETS", "SOURCES", "DataSet", "ImageArrays", "load"]
