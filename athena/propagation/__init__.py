"""The walk down the graph, and what each kind of node does to relevance.

`layer` says what an LRP layer is; `affine`, `norms`, `products`, `activations`, `passing` and `recurrent` hold
them by their kind, and `euler` what has none of its own; `notes` is what the graph does not tell, `operations` what was
computed; `graph` finds where relevance may come to, `walk` sends it down, `target` says where it starts.
"""

from athena.propagation import activations, affine, euler, norms, passing, products, recurrent

__all__ = ["activations", "affine", "euler", "norms", "passing", "products", "recurrent"]
