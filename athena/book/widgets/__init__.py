"""The book's interactive parts: `frames`, a slider that needs no kernel, and explorers that train and explain in one.

A static page has no Python behind it: what a slider shows must have been drawn before, and the browser alone shows
the picture of each stop. An explorer is both. Where a notebook is being run by its reader it answers to every
control; in a built book it is a slider over the pictures that it would have drawn.
"""

from athena.book.widgets.explorer import Explorer
from athena.book.widgets.factor import FactorExplorer
from athena.book.widgets.relevance import RelevanceExplorer
from athena.book.widgets.slider import choices, frames

__all__ = ["Explorer", "FactorExplorer", "RelevanceExplorer", "choices", "frames"]
