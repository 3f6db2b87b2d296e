"""The data sets: found, checked, cut to a fraction and put on the device as plain tensors.

MNIST and CIFAR-10, two stand-ins that need no download, `mnist5k` and `mnistm5k`, and MNIST with a planted shortcut.
Not for augmentation, batches or worker processes: a data set here is a few tensors, and `athena.training` indexes
them.

    data = load("mnist", fraction=0.05, seed=0, held_out=0.1)
    data.train_images       # (2700, 1, 32, 32), float32 in [0, 1]
"""

from athena.experiments.data.loading import DATA_SETS, NAMES, Data, at_hand, folder, inventory, load, stand_in
from athena.experiments.data.record import Arrays, DamagedData, DataError, DataSet, MissingData

__all__ = [
    "DATA_SETS",
    "NAMES",
    "Arrays",
    "DamagedData",
    "Data",
    "DataError",
    "DataSet",
    "MissingData",
    "at_hand",
    "folder",
    "inventory",
    "load",
    "stand_in",
]
