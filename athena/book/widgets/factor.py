"""Plain and guided training side by side, live."""

import copy
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import ipywidgets
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor, nn

from athena import rules
from athena.book import figures
from athena.book.tables import points, possible, signed
from athena.book.widgets.explorer import RULES, WRAPPED, Explorer, with_value, written
from athena.experiments import data, statistics, training
from athena.experiments.models import STEP_COST
from athena.guidance import SCOPES
from athena.relevance import lrp

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
FACTORS = (-1.0, -0.5, 0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 1000.0)
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "no effect": ("1 + λR stays so near 1 that both curves are one", {"factor": 0.1, "fraction": 0.05, "epochs": 3}),
    "damping": (
        "factor −0.5: what is relevant for the true class learns more slowly",
        {"factor": -0.5, "target": "label", "fraction": 0.05, "epochs": 3},
    ),
    "collapse": (
        "factor 1000, whole network, all of the data: the guided network unlearns, with some seeds more than others",
        {"factor": 1000.0, "scope": "all", "target": "logits", "fraction": 1.0, "epochs": 4},
    ),
}
"""Settings to begin with: what each shows, and what it sets; relevance is of all logits where nothing else is said."""
UNLESS_SAID = {"scope": "linear", "target": "logits"}
GLIMPSES = 40
"""How many points a curve has, unless its batches take so long that Stop would be heard late."""
REDRAW_SECONDS = 0.4


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
        gains = ", ".join(signed(100 * (guided[-1][1] - plain[-1][1]), 1) for plain, guided in pairs)
        now = (
            f"Run {len(pairs)}, epoch {done:.2f} of {self.epochs}: plain {100 * plain:.1f} %, guided "
            f"{100 * pairs[-1][1][-1][1]:.1f} %. Guided minus plain, by seed: {gains} points."
        )
        return " ".join([*self.notes, now, self._together()])

    def _together(self) -> str:
        """What the pairs that have ended say together."""
        ended = [
            (plain[-1][1], guided[-1][1])
            for plain, guided in zip(self.curves["plain"], self.curves["guided"], strict=False)
            if max(plain[-1][0], guided[-1][0]) >= self.epochs
        ]
        enough = next(n for n in range(2, 100) if 2 / 2**n < statistics.LEVEL)
        if len(ended) < enough:
            return f"Seeds differ by chance; {enough} pairs are the fewest that can show a difference."
        difference, low, high = statistics.summary(pd.Series([guided - plain for plain, guided in ended]))
        row = {"difference": difference, "low": low, "high": high}
        row["baseline_mean"] = sum(plain for plain, _ in ended) / len(ended)
        return f"Mean of {len(ended)} pairs with its 95 % interval: {points(possible(pd.Series(row)))} points."

    def share(self, seeds: int) -> float:
        """Which part of the work for so many seeds is done, from 0 to 1."""
        if not (runs := self.curves["plain"]):
            return 0.0
        return (len(runs) - 1 + runs[-1][-1][0] / self.epochs) / seeds


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
        step = STEP_COST[base.model]
        most, images = max(4, round(50 / step)), max(250, round(1000 / step))  # about a second of work
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
        """Controls, settings to begin with, buttons that train and stop, how far it is, and the curves as they grow."""
        chosen, number, choice = self.values, ipywidgets.IntSlider, ipywidgets.Dropdown
        controls = {
            "factor": ipywidgets.SelectionSlider(
                options=[
                    (written(each).replace("-", "−"), each) for each in sorted(with_value(FACTORS, chosen["factor"]))
                ],
                value=chosen["factor"],
                description="LRP factor",
                tooltip="λ in 1 + λR, by which the gradient at a guided neuron is multiplied; 0 is plain training",
            ),
            "scope": choice(
                options=tuple(SCOPES),
                value=chosen["scope"],
                description="guided layers",
                tooltip="at which layers gradients are multiplied",
            ),
            "rule": choice(
                options=with_value(RULES, chosen["rule"]),
                value=chosen["rule"],
                description="rule",
                tooltip="how a layer shares relevance out among its inputs",
            ),
            "target": choice(
                options=training.CHOICES["target"],
                value=chosen["target"],
                description="relevance of",
                tooltip="the outputs that relevance starts from",
            ),
            "fraction": ipywidgets.SelectionSlider(
                options=[(f"{100 * share:g} %", share) for share in sorted(with_value(SHARES, chosen["fraction"]))],
                value=chosen["fraction"],
                description="training data",
                tooltip="the share of the training images that both networks get",
            ),
            "epochs": number(
                value=chosen["epochs"], min=1, max=10, description="epochs", tooltip="passes over these images"
            ),
            "seeds": number(
                value=chosen["seeds"],
                min=1,
                max=10,
                description="pairs of runs",
                tooltip="how often both are trained, each time from another seed",
            ),
            "dataset": choice(
                options=data.NAMES,
                value=chosen["dataset"],
                description="data",
                tooltip="digits train the fully connected network, colour images the convolutional one",
            ),
            "image": number(
                value=chosen["image"],
                min=0,
                max=99,
                description="test image",
                tooltip="the image whose heat maps are drawn",
            ),
        }
        self._train = ipywidgets.Button(
            description="Train", button_style="primary", icon="play", tooltip="trains plain and guided side by side"
        )
        self._halt = ipywidgets.Button(
            description="Stop", icon="stop", disabled=True, tooltip="ends the training; the curves stay"
        )
        self._done = ipywidgets.FloatProgress(max=1.0, tooltip="how much of the training is done")
        row = ipywidgets.HBox([self._train, self._halt, self._done], layout={"align_items": "center"})
        seldom = ("scope", "rule", "target", "dataset")
        panel = self._panel(controls, self._presets(controls), row, seldom=seldom)
        self._train.on_click(lambda _: self.start())
        self._halt.on_click(lambda _: self.stop())
        controls["image"].observe(lambda _: self._explain_another(), "value")
        self._say("Choose, then press Train.")
        return panel

    def _presets(self, controls: Mapping[str, Any]) -> ipywidgets.Widget:
        """A button for each of `PRESETS`, which sets the controls."""

        def setter(given: Mapping[str, Any]) -> Callable[[Any], None]:
            def set_all(_: Any) -> None:
                for name, value in {**UNLESS_SAID, **given}.items():
                    controls[name].value = value

            return set_all

        buttons = []
        for name, (tip, given) in PRESETS.items():
            button = ipywidgets.Button(description=name, tooltip=tip)
            button.on_click(setter(given))
            buttons.append(button)
        return ipywidgets.HBox([ipywidgets.Label("settings to begin with:"), *buttons], layout=WRAPPED)

    def start(self) -> None:
        """Trains in the background, with the choices of this moment."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._stop.clear()
        self._train.disabled, self._halt.disabled = True, False
        self._done.value = 0.0
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
                self._done.value = pair.share(choices["seeds"])
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
