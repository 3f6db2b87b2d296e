"""Which pixels speak for a class, live."""

from pathlib import Path
from typing import Any

import anywidget
import ipywidgets
import torch
import traitlets
from matplotlib.figure import Figure
from torch import Tensor, nn

from athena import rules
from athena.book import figures
from athena.book.widgets.explorer import RULES, Explorer, with_value
from athena.relevance import lrp


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
                value=self.values["image"],
                min=0,
                max=len(self.images) - 1,
                description="image",
                tooltip="which of the images is explained",
            ),
            # by index: a Dropdown takes the value None for no choice at all
            "target": ipywidgets.Dropdown(
                options=classes,
                index=[value for _, value in classes].index(self.values["target"]),
                description="class",
                tooltip="the class whose logit is shared out among the pixels",
            ),
            "rule": ipywidgets.Dropdown(
                options=with_value(RULES, self.values["rule"]),
                value=self.values["rule"],
                description="rule",
                tooltip="how a layer shares relevance out among its inputs",
            ),
        }
        pad = Pad()
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


class Pad(anywidget.AnyWidget):
    """A square to draw in. strokes: 28 * 28 numbers from 0 to 1, row by row; empty while nothing is drawn."""

    _esm = Path(__file__).with_name("pad.js")
    strokes: traitlets.List[float] = traitlets.List().tag(sync=True)
