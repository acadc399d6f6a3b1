"""Source and target data sets as memory-mapped uint8 arrays, and the class splits of meta-training."""

from metaperturb.data.arrays import ImageArrays
from metaperturb.data.sources import SOURCES, load_source
from metaperturb.data.targets import TARGETS, TargetSpec, load_target

__all__ = ["SOURCES", "TARGETS", "ImageArrays", "TargetSpec", "load_source", "load_target"]
