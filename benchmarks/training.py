"""What the training loop of the experiments costs beside one written by hand, and beside the usual one.

    python benchmarks/training.py --rounds 12 --threads 1 --device cpu --out results/benchmarks/training-mine.json

The loop by hand has the same settings: images in one tensor on the device, channels_last, fused Adam. The usual one is
that of most tutorials: a data set of PIL images, `ToTensor`, a `DataLoader`, float32, NCHW, Adam as it comes. Where the
processor multiplies in bfloat16, ATHENA's loop is timed in that too. All arms train the same network on the same
images, some batches in turn, in an order drawn anew for each round; a ratio compares an arm with ATHENA's in float32 of
the same round. Times are CPU seconds of this process, on a GPU those of a clock.
"""

import random
import statistics
from collections.abc import Callable, Iterator

import memory
import report
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import ToTensor

from athena.experiments import data, models, training

BATCH = 64
BATCHES = 5
"""How many a loop trains on in a round."""
WARM_UP = 2
NETWORKS: dict[str, tuple[str, Callable[..., nn.Sequential]]] = {
    "mlp": ("mnist5k", models.mlp),
    "cnn": ("mnistm5k", models.cnn),
}


class Pictures(Dataset[tuple[Tensor, int]]):
    """Images as torchvision's data sets give them: from an array, by way of PIL, to a tensor."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.arrays = (255 * images).byte().permute(0, 2, 3, 1).numpy()
        self.labels = labels.tolist()
        self.transform = ToTensor()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.arrays[index].squeeze())), self.labels[index]


def steps(network: nn.Sequential, optimizer: torch.optim.Optimizer, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
    network.train()
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()


def athena_loop(name: str, count: int, device: str, precision: str = "float32") -> Callable[[], None]:
    dataset, _ = NETWORKS[name]
    loop = training._Loop(training.Run(model=name, dataset=dataset, epochs=10**6, precision=precision), device)
    epochs, rest = loop.shuffled(), list[Tensor]()

    def train() -> None:
        if len(rest) < count:
            rest[:] = next(epochs)
        loop.train_on(tuple(rest[:count]))
        del rest[:count]

    return train


def by_hand(name: str, count: int, device: str) -> Callable[[], None]:
    dataset, network_of = NETWORKS[name]
    images = data.load(dataset, device=device)
    network = network_of(images.channels).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randperm(len(images.train_labels)).split(BATCH)[:count]:
            index = index.to(device)
            x = images.train_images[index].contiguous(memory_format=torch.channels_last)
            yield x, images.train_labels[index]

    return lambda: steps(network, optimizer, batches())


def usual(name: str, count: int, device: str) -> Callable[[], None]:
    dataset, network_of = NETWORKS[name]
    images = data.load(dataset)
    network = network_of(images.channels).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    loader = DataLoader(Pictures(images.train_images, images.train_labels), batch_size=BATCH, shuffle=True)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _, (x, y) in zip(range(count), loader, strict=False):
            yield x.to(device), y.to(device)

    return lambda: steps(network, optimizer, batches())


def measure(name: str, rounds: int, alone: bool, device: str) -> Iterator[report.Table]:
    """The table of one network."""
    arms = {"ATHENA": athena_loop(name, BATCHES, device)}
    if not alone:
        arms["by hand, the same settings"] = by_hand(name, BATCHES, device)
        arms["usual: DataLoader, NCHW"] = usual(name, BATCHES, device)
    if device == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        arms["ATHENA, bfloat16"] = athena_loop(name, BATCHES, device, "bfloat16")
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    order = random.Random(0)
    for number in range(WARM_UP + rounds):
        for arm in order.sample(list(arms), len(arms)):
            began = report.now(device)
            arms[arm]()
            if number >= WARM_UP:
                seconds[arm].append((report.now(device) - began) / BATCHES)
    own = seconds["ATHENA"]
    rows: list[dict[str, str | float]] = [
        {
            "arm": arm,
            "ms a step": 1000 * statistics.median(every),
            "of ATHENA": report.ratio(every, own),
            "spread": report.spread(every, own),
        }
        for arm, every in seconds.items()
    ]
    images = data.load(NETWORKS[name][0])
    shape = BATCH, *images.train_images.shape[1:]
    yield report.Table(f"{name.upper()}, {report.shape(shape)}", rounds, rows)


def main() -> None:
    chosen = report.options("The cost of the training loop.", NETWORKS, rounds=12)
    memory.keep_freed()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    report.run(chosen, lambda name: measure(name, chosen.rounds, chosen.alone, chosen.device))


if __name__ == "__main__":
    main()
