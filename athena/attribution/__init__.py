"""Every method of thesis chapter 3 by one call: `attribute`, and `METHODS`, their names in the thesis's order.

    athena.attribution.attribute("grad_cam", model, x, target=1)    # a tensor like x

Each method has a file of its own, with its options. Captum computes where it is right. Where it goes by modules, and so
is silently wrong on functional, in-place or reused activations, the file goes through the operations of the graph.
Not here: how LRP works (`athena.relevance`), and how good a heat map is (`athena.evaluation`).
"""

from athena.attribution.completeness import IncompleteWarning
from athena.attribution.methods import METHODS, attribute

__all__ = ["METHODS", "IncompleteWarning", "attribute"]
