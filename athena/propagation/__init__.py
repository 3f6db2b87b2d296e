"""The walk down the graph, and what each kind of node does to relevance.

`layer` says what an LRP layer is; `affine`, `norms`, `products`, `activations`, `fused`, `passing` and `recurrent` hold
them by their kind, and `euler` what has none of its own; `notes` is what the graph does not tell, `operations` what was
computed; `walk` goes down the graph, `target` says where relevance starts.
"""

from athena.propagation import activations, affine, euler, fused, norms, passing, products, recurrent

__all__ = ["activations", "affine", "euler", "fused", "norms", "passing", "products", "recurrent"]
