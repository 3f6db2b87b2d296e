"""The book's interactive parts: `frames`, a slider that needs no kernel, and explorers that train and explain in one.

A static page has no Python behind it: what a slider shows must have been drawn before, and a link that the browser
alone can follow does the rest. An explorer is both. Where a notebook is being run by its reader it answers to every
control; in a built book it is a slider over the pictures that it would have drawn.
"""

import copy
import html
import io
import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets
import torch
import traitlets
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from athena import rules
from athena.book import figures
from athena.experiments import data, training
from athena.guidance import SCOPES
from athena.relevance import lrp

__all__ = ["Explorer", "FactorExplorer", "RelevanceExplorer", "frames"]

RULES = ("Epsilon(1e-06)", "Zero()", "Gamma(0.25)", "ZPlus()", "AlphaBeta(2, 1)", "Flat()")
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
GLIMPSES = 40
"""How many points a curve has, unless its batches take so long that Stop would be heard late."""
PACE = {"mlp": (50, 1000), "cnn": (4, 250)}
"""Batches between two points at most, and test images for each point: about a second's work."""
REDRAW_SECONDS = 0.4
NARROW = {"description_width": "initial"}
WIDE = {"width": "100%", "max_width": "924px"}


def frames(pictures: Mapping[str, Figure], label: str, value: str | None = None) -> ipywidgets.VBox:
    """A slider that goes through figures drawn beforehand.

    Args:
        pictures: the figure for each stop of the slider, in order.
        label: what the slider moves, for the reader.
        value: the stop to begin with; by default the first.

    Raises:
        ValueError: there is no picture, or none for `value`.
    """
    stops = list(pictures)
    if not stops or (value is not None and value not in stops):
        raise ValueError(f"a slider from {stops} cannot begin at {value!r}")
    images = [ipywidgets.Image(value=_png(figure), format="png", layout=WIDE) for figure in pictures.values()]
    slider = ipywidgets.SelectionSlider(
        options=stops,
        index=stops.index(value or stops[0]),
        description=label,
        continuous_update=True,
        style=NARROW,
        layout={"width": "100%", "max_width": "480px"},
    )
    stack = ipywidgets.Stack(images, selected_index=slider.index)
    # "index", not "value": the browser knows nothing of a SelectionSlider's value
    ipywidgets.jslink((slider, "index"), (stack, "selected_index"))
    return ipywidgets.VBox([slider, stack])


class Explorer(ABC):
    """Choices, and a picture that follows them.

    As the last line of a cell it shows itself: live where the reader runs the notebook, else as `frames` of the one
    choice that matters most, which want `figure` above them.

    Attributes:
        values: what is chosen, by name. The controls of `live` change it.
        moved: the choice that a built page lets its reader move, what to call it, and its stops.
    """

    values: dict[str, Any]
    moved: tuple[str, str, Sequence[Any]]

    def __init__(self) -> None:
        self._drawn_stops: dict[str, Figure] = {}

    @abstractmethod
    def picture(self, **choices: Any) -> Figure:
        """What is shown for the choices given by name; each of the others is as in `values`."""

    @abstractmethod
    def live(self) -> ipywidgets.Widget:
        """The controls and the picture, with this kernel behind them."""

    def figure(self) -> Figure | None:
        """What a built page shows above the slider, for readers without JavaScript; None where this is live."""
        return None if _served() else self._stops()[self._first()]

    def _first(self) -> str:
        """Where the slider of a built page begins."""
        name, _, stops = self.moved
        return _written(self.values[name] if self.values[name] in stops else stops[0])

    def _stops(self) -> dict[str, Figure]:
        """The picture for each stop of `moved`, drawn once."""
        name, _, stops = self.moved
        if not self._drawn_stops:
            self._drawn_stops.update({_written(stop): self.picture(**{name: stop}) for stop in stops})
        return self._drawn_stops

    def choices(self, **given: Any) -> dict[str, Any]:
        """`values`, except for what is `given`.

        Raises:
            TypeError: there is no such choice.
        """
        if unknown := set(given) - set(self.values):
            raise TypeError(f"there is no choice called {', '.join(sorted(unknown))}, but {', '.join(self.values)}")
        return self.values | given

    def _panel(self, controls: Mapping[str, Any], *more: ipywidgets.Widget) -> ipywidgets.VBox:
        """Controls that set `values`, a line for messages and the picture, with `more` between."""

        def follow(name: str) -> Callable[[Any], None]:
            return lambda change: self.values.update({name: change["new"]})

        for name, control in controls.items():
            control.style, control.layout.width = NARROW, "300px"
            control.observe(follow(name), "value")
        self._message = ipywidgets.HTML()
        self._image = ipywidgets.Image(format="png", layout=WIDE)
        row = ipywidgets.HBox(list(controls.values()), layout={"flex_flow": "row wrap", "max_width": "924px"})
        return ipywidgets.VBox([row, *more, self._message, self._image])

    def _say(self, text: str) -> None:
        self._message.value = html.escape(text)

    def _complain(self, error: Exception) -> None:
        """An error, where the reader looks and not in a log."""
        said = html.escape(f"{type(error).__name__}: {error}").replace("\n", "<br>")
        self._message.value = f'<span role="alert" style="color: #b3261e">{said}</span>'

    def _draw(self, figure: Figure) -> None:
        self._image.value = _png(figure, reduced=False)  # nothing is kept, and reducing takes longer than drawing

    def _ipython_display_(self) -> None:
        display(self.live() if _served() else frames(self._stops(), self.moved[1], self._first()))


@dataclass
class _Pair:
    """Plain and guided runs as they train side by side.

    curves: for each arm and seed, (epochs, accuracy). networks: of the first seed. notes: what went wrong.
    """

    image: Tensor
    label: int
    rule: rules.Rule
    epochs: int
    curves: dict[str, list[list[tuple[float, float]]]] = field(default_factory=lambda: {"plain": [], "guided": []})
    networks: dict[str, nn.Module] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def figure(self) -> Figure:
        maps = {}
        for name, network in self.networks.items():
            x = self.image.to(next(network.parameters()).device)
            maps[name] = lrp(network, x[None], self.label, self.rule).input[0].cpu().nan_to_num(0.0, 0.0, 0.0)
        return figures.progress(self.curves, self.epochs, self.image, maps)

    def said(self) -> str:
        """What the curves show so far."""
        if not self.curves["guided"]:
            return "Loading."
        pairs = list(zip(self.curves["plain"], self.curves["guided"], strict=False))
        done, plain = pairs[-1][0][-1]
        gains = ", ".join(f"{100 * (guided[-1][1] - plain[-1][1]):+.1f}" for plain, guided in pairs)
        now = (
            f"Run {len(pairs)}, epoch {done:.2f} of {self.epochs}: plain {100 * plain:.1f} %, guided "
            f"{100 * pairs[-1][1][-1][1]:.1f} %. Guided less plain, by seed: {gains} points. Seeds differ by chance; "
            "one pair shows nothing."
        )
        return " ".join([*self.notes, now])


class FactorExplorer(Explorer):
    """Trains plain and guided side by side, and shows how both networks explain one image.

    Args:
        dataset: a name of `athena.data.NAMES`; where it cannot be had, its stand-in.
        factor, scope, rule, target, fraction, seeds, epochs: what the controls begin with; seeds is how many, the
            rest as in `athena.Run`. MNIST's kind of data trains the fully connected network, colour the convolutional.
        image: the test image that is explained.
        factors: the stops of the slider on a built page.
    """

    def __init__(
        self,
        dataset: str = "mnist5k",
        factor: float = 1.0,
        scope: str = "linear",
        rule: str = RULES[0],
        target: str = "logits",
        fraction: float = 0.05,
        seeds: int = 1,
        epochs: int = 3,
        image: int = 0,
        factors: Sequence[float] = (0.1, 0.5, 1, 2, 5, 10),
    ) -> None:
        super().__init__()
        self.values = {
            "factor": float(factor),
            "scope": scope,
            "rule": rule,
            "target": target,
            "fraction": float(fraction),
            "epochs": epochs,
            "seeds": seeds,
            "dataset": data.at_hand(dataset),
            "image": image,
        }
        self.moved = ("factor", "LRP factor", factors)
        self._pair: _Pair | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        # What PyTorch imports for its first optimiser takes seconds: now, and not when Train has been pressed.
        next(training.watch(training.Run(dataset=self.values["dataset"], fraction=1e-9), images=1))

    def picture(self, **choices: Any) -> Figure:
        """Trains for the choices given by name, from beginning to end, and draws the outcome."""
        *_, pair = self.train(**choices)
        return pair.figure()

    def train(self, **choices: Any) -> Iterator[_Pair]:
        """Trains for the choices given by name, and shows how far it is after every few batches."""
        chosen = self.choices(**choices)
        image, label = self._example(chosen)
        pair = _Pair(image, label, rules.parse(chosen["rule"]), chosen["epochs"])
        for seed in range(chosen["seeds"]):
            base = training.Run(
                model="mlp" if len(image) == 1 else "cnn",
                dataset=chosen["dataset"],
                fraction=chosen["fraction"],
                seed=seed,
                epochs=chosen["epochs"],
            )
            guided = {name: chosen[name] for name in ("factor", "scope", "rule", "target")}
            yield from self._one_seed(pair, {"plain": base, "guided": training.Run(**vars(base) | guided)})

    def _one_seed(self, pair: _Pair, runs: Mapping[str, training.Run]) -> Iterator[_Pair]:
        base = runs["plain"]
        whole = data.load(base.dataset, base.fraction, base.seed)
        batches = round(base.epochs * -(-len(whole.train_labels) // base.batch_size))
        most, images = PACE[base.model]
        every = min(most, max(1, batches // GLIMPSES))
        watched = [training.watch(run, every, images) for run in runs.values()]
        for glimpses in zip_longest(*watched):  # a run that diverges ends before the other
            for arm, glimpse in zip(runs, glimpses, strict=True):
                if glimpse is None:
                    continue
                if glimpse.epochs == 0:
                    pair.curves[arm].append([])
                if not pair.networks:
                    pair.networks["untrained"] = copy.deepcopy(glimpse.model)
                if base.seed == 0:
                    pair.networks[arm] = glimpse.model
                if glimpse.diverged is not None:
                    pair.notes.append(
                        f"Seed {base.seed}, {arm}: gradients not finite at step {glimpse.diverged['step']}."
                    )
                pair.curves[arm][-1].append((glimpse.epochs, glimpse.accuracy))
            yield pair

    def _example(self, chosen: Mapping[str, Any]) -> tuple[Tensor, int]:
        """The test image that is explained, and what it shows."""
        whole = data.load(chosen["dataset"], fraction=1e-9)  # the test images are what is wanted
        return whole.test_images[chosen["image"]], int(whole.test_labels[chosen["image"]])

    def live(self) -> ipywidgets.Widget:
        """Controls, a button that trains and one that stops, and the curves as they grow."""
        chosen, number, choice = self.values, ipywidgets.IntSlider, ipywidgets.Dropdown
        controls = {
            "factor": ipywidgets.FloatLogSlider(
                value=chosen["factor"], min=-2, max=2, step=0.05, readout_format=".3g", description="LRP factor"
            ),
            "scope": choice(options=tuple(SCOPES), value=chosen["scope"], description="guided layers"),
            "rule": choice(options=_with(RULES, chosen["rule"]), value=chosen["rule"], description="rule"),
            "target": choice(options=training.CHOICES["target"], value=chosen["target"], description="relevance of"),
            "fraction": ipywidgets.SelectionSlider(
                options=[(f"{100 * share:g} %", share) for share in sorted(_with(SHARES, chosen["fraction"]))],
                value=chosen["fraction"],
                description="training data",
            ),
            "epochs": number(value=chosen["epochs"], min=1, max=10, description="epochs"),
            "seeds": number(value=chosen["seeds"], min=1, max=10, description="pairs of runs"),
            "dataset": choice(options=data.NAMES, value=chosen["dataset"], description="data"),
            "image": number(value=chosen["image"], min=0, max=99, description="test image"),
        }
        self._train = ipywidgets.Button(description="Train", button_style="primary", icon="play")
        self._halt = ipywidgets.Button(description="Stop", icon="stop", disabled=True)
        panel = self._panel(controls, ipywidgets.HBox([self._train, self._halt]))
        self._train.on_click(lambda _: self.start())
        self._halt.on_click(lambda _: self.stop())
        controls["image"].observe(lambda _: self._explain_another(), "value")
        self._say("Choose, then press Train.")
        return panel

    def start(self) -> None:
        """Trains in the background, with the choices of this moment."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._stop.clear()
        self._train.disabled, self._halt.disabled = True, False
        self._say("Loading.")
        self._thread = threading.Thread(target=self._work, args=(self.choices(),), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the training after the batches it is at; what was measured stays on the screen."""
        self._stop.set()

    def _work(self, choices: dict[str, Any]) -> None:
        drawn = 0.0
        try:
            for pair in self.train(**choices):
                self._pair = pair
                if self._stop.is_set():
                    break
                if time.perf_counter() - drawn > REDRAW_SECONDS:
                    self._show(pair)
                    drawn = time.perf_counter()
            self._show(self._pair, "Stopped. " if self._stop.is_set() else "Done. ")
        except Exception as error:
            self._complain(error)
        finally:
            self._train.disabled, self._halt.disabled = False, True

    def _show(self, pair: _Pair | None, before: str = "") -> None:
        if pair is not None:
            self._draw(pair.figure())
            self._say(before + pair.said())

    def _explain_another(self) -> None:
        """Another image for the networks that are there; while they train, the thread draws it."""
        if self._pair is None:
            return
        try:
            self._pair.image, self._pair.label = self._example(self.values)
            if self._thread is None or not self._thread.is_alive():
                self._draw(self._pair.figure())
        except Exception as error:
            self._complain(error)


class RelevanceExplorer(Explorer):
    """Which pixels speak for a class: an image chosen or drawn, the class and the rule.

    Args:
        model: maps (1, channels, 32, 32) to (1, classes).
        images: (n, channels, 32, 32) float, from 0 to 1, to choose from.
        rule: a rule as text, to begin with.
    """

    def __init__(self, model: nn.Module, images: Tensor, rule: str = RULES[0]) -> None:
        super().__init__()
        self.model, self.images, self.strokes = model, images, list[float]()
        self.values = {"image": 0, "target": None, "rule": rule}
        self.moved = ("target", "class", range(self._logits(images[0]).numel()))

    def picture(self, **choices: Any) -> Figure:
        """The image, its heat map and the network's probabilities."""
        chosen = self.choices(**choices)
        x = self._drawn() if self.strokes and "image" not in choices else self.images[chosen["image"]]
        r = lrp(self.model, x[None], chosen["target"], rules.parse(chosen["rule"]))
        logits = self._logits(x)
        asked = int(logits.argmax()) if chosen["target"] is None else chosen["target"]
        return figures.answer(x, r.input[0], logits.softmax(0), asked)

    def live(self) -> ipywidgets.Widget:
        """Controls, a square to draw in, and the picture, which follows at once."""
        classes = [("the network's answer", None), *((str(stop), stop) for stop in self.moved[2])]
        controls = {
            "image": ipywidgets.IntSlider(
                value=self.values["image"], min=0, max=len(self.images) - 1, description="image"
            ),
            # by index: a Dropdown takes the value None for no choice at all
            "target": ipywidgets.Dropdown(
                options=classes,
                index=[value for _, value in classes].index(self.values["target"]),
                description="class",
            ),
            "rule": ipywidgets.Dropdown(
                options=_with(RULES, self.values["rule"]), value=self.values["rule"], description="rule"
            ),
        }
        pad = _Pad()
        panel = self._panel(controls, pad)

        def drawn(change: Any) -> None:
            self.strokes = change["new"]
            self._redraw()

        pad.observe(drawn, "strokes")
        controls["image"].observe(lambda _: pad.set_trait("strokes", []), "value")
        for control in controls.values():
            control.observe(lambda _: self._redraw(), "value")
        self._redraw()
        return panel

    def _redraw(self) -> None:
        try:
            self._draw(self.picture())
            self._say("Your drawing; move “image” to come back." if self.strokes else "Choose, or draw a digit.")
        except Exception as error:
            self._complain(error)

    @torch.no_grad()
    def _logits(self, x: Tensor) -> Tensor:
        return self.model.eval()(x[None])[0]

    def _drawn(self) -> Tensor:
        """The drawing as an image like MNIST's: 28 x 28 in the middle of 32 x 32, its centre of mass in the centre."""
        cells = torch.tensor(self.strokes, dtype=torch.float32).reshape(28, 28)
        padded = nn.functional.pad(cells, (2, 2, 2, 2))
        place = torch.arange(32.0)
        weight = padded.sum() + 1e-9
        shifts = [round(15.5 - float((padded.sum(1 - axis) * place).sum() / weight)) for axis in (0, 1)]
        return padded.roll(shifts, (0, 1)).expand_as(self.images[0])


class _Pad(anywidget.AnyWidget):
    """A square to draw in. strokes: 28 * 28 numbers from 0 to 1, row by row; empty while nothing is drawn."""

    _esm = Path(__file__).with_name("pad.js")
    strokes: traitlets.List[float] = traitlets.List().tag(sync=True)


def _served() -> bool:
    """Whether a reader runs this: a notebook server names its session, and Colab and VS Code show themselves."""
    return "JPY_SESSION_NAME" in os.environ or "google.colab" in sys.modules or "VSCODE_PID" in os.environ


def _with(options: Sequence[Any], value: Any) -> tuple[Any, ...]:
    """The options, with a value that is none of them in front."""
    return tuple(dict.fromkeys([*([] if value in options else [value]), *options]))


def _written(stop: Any) -> str:
    return f"{stop:g}" if isinstance(stop, float) else str(stop)


def _png(figure: Figure, reduced: bool = True) -> bytes:
    """The figure, by default in 256 colours, by which a page with its frames has less than half the size."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    if not reduced:
        return drawn.getvalue()
    small = io.BytesIO()
    Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    return small.getvalue()
