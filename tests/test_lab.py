"""Claims about the lab: training in the page is `athena.Guidance`, and its digits are those of mnist5k."""

import base64
import importlib.util
import io
import itertools
import json
import re
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from playwright.sync_api import Page, sync_playwright
from torch import Tensor, nn

import athena

ROOT = Path(__file__).resolve().parent.parent
LAB = ROOT / "book" / "_assets" / "lab"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LARGEST_SPRITE = 300_000  # bytes
STEPS = 50
BOTH = ["linear1", "linear2"]

# The guided network of a pair in the page, as its worker trains it. Arrays come as the text of their float64 bytes.
TRAIN = """([guidance, steps]) => {
    const bytes = (values) => {
        const given = new Uint8Array(Float64Array.from(values).buffer);
        let text = "";
        for (let i = 0; i < given.length; i += 4096) text += String.fromCharCode(...given.subarray(i, i + 4096));
        return btoa(text);
    };
    const { guided, batches } = guidedTraining().pair(window.digits, 3, guidance);
    const parameters = (layers) => layers.flatMap(({ weight, bias }) => [bytes(weight), bytes(bias)]);
    const start = parameters(guided.network);
    const found = Array.from({ length: steps }, () => {
        const { x, labels } = batches.next().value;
        const { loss, gradients, relevance } = guided.step({ x, labels });
        return { x: bytes(x), labels, loss, gradients: parameters(gradients), relevance: relevance.map(bytes) };
    });
    return { start, found, trained: parameters(guided.network) };
}"""


def digits() -> tuple[Tensor, Tensor]:
    """The digits that the page has: (n, 256) in [0, 1], float64, and their classes."""
    text = (LAB / "digits.js").read_text("utf8")
    (labels,), (picture,) = re.findall(r'labels: "(\d+)"', text), re.findall(r'base64,([^"]+)"', text)
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("L"))
    tiles = sheet.reshape(-1, 16, 44, 16).swapaxes(1, 2).reshape(-1, 256)[: len(labels)]
    return torch.tensor(tiles / 255), torch.tensor([int(label) for label in labels])


def tensor(text: str) -> Tensor:
    """The numbers that the page has written as text."""
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float64)


def network(start: list[Tensor]) -> nn.Sequential:
    """The lab's network in PyTorch, with given weights and biases."""
    sizes = [256, 64, 32, 10]
    layers = [nn.Linear(*pair, dtype=torch.float64) for pair in itertools.pairwise(sizes)]
    model = nn.Sequential(
        OrderedDict(linear1=layers[0], relu1=nn.ReLU(), linear2=layers[1], relu2=nn.ReLU(), linear3=layers[2])
    )
    with torch.no_grad():
        for parameter, given in zip(model.parameters(), start, strict=True):
            parameter.copy_(given.view_as(parameter))
    return model


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """An empty page that has the lab's module."""
    if CHROMIUM is None:
        pytest.fail("there is no Chromium here: install it, as by `apt-get install chromium`")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.add_script_tag(path=LAB / "guidance.js")
        images, labels = digits()
        given = json.dumps({"images": images[:1024].flatten().tolist(), "labels": labels[:1024].tolist()})
        page.evaluate(
            """(text) => {
                const { images, labels } = JSON.parse(text);
                window.digits = { images: Float64Array.from(images), labels };
            }""",
            given,
        )
        yield page
        browser.close()


@pytest.mark.browser
@pytest.mark.parametrize(
    "factor, scope, normalise",
    [
        (0.0, BOTH, None),
        (1.0, BOTH, None),
        (10.0, BOTH, None),
        (-0.5, BOTH, None),
        (2.0, ["linear1"], None),
        (2.0, ["linear2"], None),
        (5.0, BOTH, "max"),
        (-1.0, BOTH, "rms"),
    ],
)
def test_fifty_steps_in_the_page_are_those_of_the_package(
    page: Page, factor: float, scope: list[str], normalise: str | None
) -> None:
    in_page = page.evaluate(TRAIN, [{"factor": factor, "scope": scope, "normalise": normalise}, STEPS])
    model = network([tensor(text) for text in in_page["start"]])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    assert len(in_page["found"]) == STEPS
    with athena.Guidance(model, factor=factor, scope=scope, normalise=normalise):
        for step in in_page["found"]:
            x = tensor(step["x"]).view(-1, 256)
            relevance = athena.lrp(model, x).layers
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), torch.tensor(step["labels"]))
            loss.backward()
            assert step["loss"] == pytest.approx(loss.item(), abs=1e-6)
            assert all(map(close, step["gradients"], [parameter.grad for parameter in model.parameters()]))
            assert all(map(close, step["relevance"], relevance.values()))
            optimizer.step()
    assert all(map(close, in_page["trained"], model.parameters()))


@pytest.mark.browser
def test_the_comparison_notices_a_factor_that_is_a_little_off(page: Page) -> None:
    """Twice the training in the page, with factors that differ by one part in a thousand."""
    first, other = (
        page.evaluate(TRAIN, [{"factor": factor, "scope": BOTH, "normalise": None}, 10]) for factor in (1.0, 1.001)
    )
    assert not all(map(close, first["trained"], [tensor(text) for text in other["trained"]]))


def close(in_page: str, own: Tensor) -> bool:
    """Whether the page's numbers are those of the package to 1e-6."""
    return torch.allclose(tensor(in_page).view_as(own), own, rtol=0, atol=1e-6)


@pytest.mark.browser
def test_a_heat_map_in_the_page_is_that_of_the_package(page: Page) -> None:
    image = digits()[0][1024]
    text = page.evaluate(
        """(pixels) => {
            const { pair, explain } = guidedTraining();
            const { network } = pair({ images: new Float64Array(256), labels: [0] }, 5, null).plain;
            const { answer, logit, pixels: R } = explain(network, Float64Array.from(pixels));
            const start = network.flatMap(({ weight, bias }) => [Array.from(weight), Array.from(bias)]);
            return JSON.stringify({ start, answer, logit, R: Array.from(R) });
        }""",
        image.tolist(),
    )
    explained = json.loads(text)
    model = network([torch.tensor(values, dtype=torch.float64) for values in explained["start"]])
    relevance = athena.lrp(model, image[None])
    assert explained["answer"] == int(model(image[None]).argmax())
    assert explained["logit"] == pytest.approx(model(image[None]).max().item(), abs=1e-12)
    assert torch.allclose(torch.tensor(explained["R"], dtype=torch.float64), relevance.input[0], rtol=0, atol=1e-9)


def test_the_digits_of_the_lab_are_those_of_mnist5k_and_small() -> None:
    spec = importlib.util.spec_from_file_location("digits", ROOT / "book" / "digits.py")
    assert spec is not None and spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    mnist5k = athena.data.load("mnist5k")
    images, labels = digits()
    expected = torch.cat([mnist5k.train_images[: maker.TRAIN], mnist5k.test_images[: maker.TEST]])
    means = F.avg_pool2d(expected, 2).flatten(1).double()
    assert (images - means).abs().max() <= 0.5 / (maker.SHADES - 1) + 1e-6
    assert labels.tolist() == [
        *mnist5k.train_labels[: maker.TRAIN].tolist(),
        *mnist5k.test_labels[: maker.TEST].tolist(),
    ]
    assert maker.SPRITE.stat().st_size < LARGEST_SPRITE
