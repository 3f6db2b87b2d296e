"""Plain and guided training side by side, live."""

import copy
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import ipywidgets
from matplotlib.figure import Figure
from torch import Tensor, nn

from athena import rules
from athena.book import figures
from athena.book.widgets.explorer import RULES, Explorer, with_value
from athena.experiments import data, training
from athena.experiments.models import STEP_COST
from athena.guidance import SCOPES
from athena.relevance import lrp

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
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
        gains = ", ".join(f"{100 * (guided[-1][1] - plain[-1][1]):+.1f}" for plain, guided in pairs)
        now = (
            f"Run {len(pairs)}, epoch {done:.2f} of {self.epochs}: plain {100 * plain:.1f} %, guided "
            f"{100 * pairs[-1][1][-1][1]:.1f} %. Guided minus plain, by seed: {gains} points. Seeds differ by chance; "
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
        """Controls, a button that trains and one that stops, and the curves as they grow."""
        chosen, number, choice = self.values, ipywidgets.IntSlider, ipywidgets.Dropdown
        controls = {
            "factor": ipywidgets.FloatLogSlider(
                value=chosen["factor"], min=-2, max=2, step=0.05, readout_format=".3g", description="LRP factor"
            ),
            "scope": choice(options=tuple(SCOPES), value=chosen["scope"], description="guided layers"),
            "rule": choice(options=with_value(RULES, chosen["rule"]), value=chosen["rule"], description="rule"),
            "target": choice(options=training.CHOICES["target"], value=chosen["target"], description="relevance of"),
            "fraction": ipywidgets.SelectionSlider(
                options=[(f"{100 * share:g} %", share) for share in sorted(with_value(SHARES, chosen["fraction"]))],
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
