"""The book's figures, all in one look. Each function draws from what it is given and returns the figure.

Accuracies come in as 0 to 1 and are drawn in percent, differences in percentage points, both with 95 % intervals.
Relevance is drawn on a diverging scale with white at zero: red speaks for the class explained, blue against it.
Not here: the numbers themselves (`athena.statistics`), and anything that moves (`athena.widgets`).
"""

from athena.book.figures.curves import accuracy, differences, last_epochs, paired, ratios, seeds, starts, two_arms
from athena.book.figures.diagrams import flow, matrices, network
from athena.book.figures.early_stopping import epochs_trained, stopping, thesis_columns
from athena.book.figures.maps import answer, arrays, conservation, flipping, heat_maps, progress, relevance_limit, text
from athena.book.figures.style import BIAS, GUIDED, LOW_DATA, PLAIN, RELEVANCE, STABILISER, THESIS, canvas, style

__all__ = [
    "BIAS",
    "GUIDED",
    "LOW_DATA",
    "PLAIN",
    "RELEVANCE",
    "STABILISER",
    "THESIS",
    "accuracy",
    "answer",
    "arrays",
    "canvas",
    "conservation",
    "differences",
    "epochs_trained",
    "flipping",
    "flow",
    "heat_maps",
    "last_epochs",
    "matrices",
    "network",
    "paired",
    "progress",
    "ratios",
    "relevance_limit",
    "seeds",
    "starts",
    "stopping",
    "style",
    "text",
    "thesis_columns",
    "two_arms",
]
