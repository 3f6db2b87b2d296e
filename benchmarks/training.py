"""What the training loop of the experiments costs beside one written by hand, and beside the usual one.

    python benchmarks/training.py --rounds 12 --batches 5 --threads 1 --device cpu

The loop by hand has the same settings: images in one tensor on the device, channels_last, fused Adam. The usual one is
that of most tutorials: a data set of PIL images, `ToTensor`, a `DataLoader`, float32, NCHW, Adam as it comes. Where the
processor multiplies in bfloat16, ATHENA's loop is timed in that too. All arms train the same network on the same
images, some batches in turn, in an order drawn anew for each round; a ratio compares an arm with ATHENA's in float32 of
the same round.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import memory
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import ToTensor

from athena import data, models, training

BATCH = 64
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


def measure(name: str, rounds: int, count: int, device: str) -> str:
    arms = {
        "ATHENA": athena_loop(name, count, device),
        "by hand, the same settings": by_hand(name, count, device),
        "usual: DataLoader, NCHW": usual(name, count, device),
    }
    if device == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        arms["ATHENA, bfloat16"] = athena_loop(name, count, device, "bfloat16")
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    order = random.Random(0)
    for _ in range(WARM_UP + rounds):
        for arm in order.sample(list(arms), len(arms)):
            began = time.perf_counter()
            arms[arm]()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[arm].append((time.perf_counter() - began) / count)
    lines = [name, f"{'loop':<30}{'ms a step':>11}{'of ATHENA':>11}"]
    own = seconds["ATHENA"][WARM_UP:]
    for arm, every in seconds.items():
        kept = every[WARM_UP:]
        ratio = statistics.median(other / ours for other, ours in zip(kept, own, strict=True))
        lines.append(f"{arm:<30}{1000 * statistics.median(kept):>11.2f}{ratio:>11.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of the training loop.")
    parser.add_argument("--rounds", type=int, default=12, help="timed rounds")
    parser.add_argument("--batches", type=int, default=5, help="batches of each loop in a round")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options: Any = parser.parse_args()
    memory.keep_freed()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"PyTorch {torch.__version__}, {options.device}, {options.threads} thread(s), batch {BATCH}, plain training")
    for name in NETWORKS:
        print("", measure(name, options.rounds, options.batches, options.device), sep="\n", flush=True)


if __name__ == "__main__":
    main()
