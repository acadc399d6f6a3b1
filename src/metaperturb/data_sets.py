"""Which data sets there are: the sources of φ, and the targets that networks are trained on with it (section 4 of the
paper). `metaperturb.data` loads them; this table can be read without importing PyTorch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DataSet:
    """What is known of a data set before it is loaded."""

    title: str  # its name in tables
    num_classes: int | None  # None: as many as are found
    images: dict[str, int | None]  # split → how many images it must have
    image_size: int  # default height = width in pixels
    how: str = "downloaded"  # or had "by hand", "drawn" when asked for, "named" by a path


# Counts: appendix of the paper and the sets' own pages. DTD: partition 1, train and val together for training. "test"
# of Tiny ImageNet: its validation images.
DATA_SETS: dict[str, DataSet] = {
    "stl10": DataSet("STL10", 10, {"train": 5000, "test": 8000}, 96),
    "s_cifar100": DataSet("s-CIFAR100", 100, {"train": 5000, "val": 2500, "test": 10000}, 32),
    "cifar100": DataSet("CIFAR-100", 100, {"train": 50000, "test": 10000}, 32),
    "dogs": DataSet("Stanford Dogs", 120, {"train": 12000, "test": 8580}, 84),
    "cars": DataSet("Stanford Cars", 196, {"train": 8144, "test": 8041}, 84, "by hand"),
    "aircraft": DataSet("FGVC Aircraft", 100, {"train": 6667, "test": 3333}, 84),
    "cub": DataSet("CUB-200-2011", 200, {"train": 5994, "test": 5794}, 84),
    "small_svhn": DataSet("small SVHN", 10, {"train": 5000, "test": 26032}, 32),
    "fashion_mnist": DataSet("Fashion-MNIST", 10, {"train": 60000, "test": 10000}, 32),
    "dtd": DataSet("DTD", 47, {"train": 3760, "test": 1880}, 84),
    "folder": DataSet("image folder", None, {"train": None, "val": None, "test": None}, 32, "named"),
    "embedded": DataSet("embedded", 16, {"train": 400, "test": 1008}, 32, "drawn"),
    "tiny_imagenet": DataSet("Tiny ImageNet", 200, {"train": 100_000, "test": 10_000}, 32),
    "embedded_source": DataSet("embedded source", 40, {"train": 4800}, 32, "drawn"),
}
# What φ is meta-trained on, by the names that `source` has for it.
SOURCES = {"tiny_imagenet": "tiny_imagenet", "embedded": "embedded_source", "folder": "folder"}
