"""What the explorers share: choices, a picture that follows them, and its frames on a built page."""

import html
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets
from IPython.display import display
from matplotlib.figure import Figure

from athena.book.widgets.slider import frames, png

RULES = ("Epsilon(1e-06)", "Zero()", "Gamma(0.25)", "ZPlus()", "AlphaBeta(2, 1)", "Flat()")
NARROW = {"description_width": "initial"}
WIDE = {"width": "100%", "max_width": "924px"}
WRAPPED = {"flex_flow": "row wrap", "max_width": "924px"}


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
        if served():
            return None
        name, _, stops = self.moved
        return self._stops()[written(self.values[name])] if self.values[name] in stops else self.picture()

    def _first(self) -> str:
        """Where the slider of a built page begins: at another picture than the one above it."""
        name, _, stops = self.moved
        return written(next((stop for stop in reversed(stops) if stop != self.values[name]), stops[0]))

    def _stops(self) -> dict[str, Figure]:
        """The picture for each stop of `moved`, drawn once."""
        name, _, stops = self.moved
        if not self._drawn_stops:
            self._drawn_stops.update({written(stop): self.picture(**{name: stop}) for stop in stops})
        return self._drawn_stops

    def choices(self, **given: Any) -> dict[str, Any]:
        """`values`, except for what is `given`.

        Raises:
            TypeError: there is no such choice.
        """
        if unknown := set(given) - set(self.values):
            raise TypeError(f"there is no choice called {', '.join(sorted(unknown))}, but {', '.join(self.values)}")
        return self.values | given

    def _panel(
        self, controls: Mapping[str, Any], *more: ipywidgets.Widget, seldom: Sequence[str] = ()
    ) -> ipywidgets.VBox:
        """Controls that set `values`, a line for messages and the picture, with `more` between.

        Those named in `seldom` are folded away. The picture has no place before the first is drawn.
        """

        def follow(name: str) -> Callable[[Any], None]:
            return lambda change: self.values.update({name: change["new"]})

        for name, control in controls.items():
            control.style, control.layout.width = NARROW, "300px"
            control.observe(follow(name), "value")
        self._message = ipywidgets.HTML()
        self._image = ipywidgets.Image(format="png", layout=WIDE | {"display": "none"})
        rows = [
            ipywidgets.HBox(
                [control for name, control in controls.items() if (name in seldom) is folded], layout=WRAPPED
            )
            for folded in (False, True)
        ]
        fold = [ipywidgets.Accordion([rows[1]], titles=("more settings",), layout=WIDE)] if seldom else []
        return ipywidgets.VBox([rows[0], *fold, *more, self._message, self._image])

    def _say(self, text: str) -> None:
        self._message.value = html.escape(text)

    def _complain(self, error: Exception) -> None:
        """An error, where the reader looks and not in a log."""
        said = html.escape(f"{type(error).__name__}: {error}").replace("\n", "<br>")
        self._message.value = f'<span role="alert" style="color: #b3261e">{said}</span>'

    def _draw(self, figure: Figure) -> None:
        self._image.layout.display = None
        self._image.value = png(figure, reduced=False)  # nothing is kept, and reducing takes longer than drawing

    def _ipython_display_(self) -> None:
        display(self.live() if served() else frames(self._stops(), self.moved[1], self._first()))


def served() -> bool:
    """Whether a reader runs this: a notebook server names its session, and Colab and VS Code show themselves."""
    return "JPY_SESSION_NAME" in os.environ or "google.colab" in sys.modules or "VSCODE_PID" in os.environ


def with_value(options: Sequence[Any], value: Any) -> tuple[Any, ...]:
    """The options, with a value that is none of them in front."""
    return tuple(dict.fromkeys([*([] if value in options else [value]), *options]))


def written(stop: Any) -> str:
    """A stop of a slider as text."""
    return f"{stop:g}" if isinstance(stop, float) else str(stop)
