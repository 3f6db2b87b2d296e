"""The walk down the graph, and what each kind of node does to relevance.

`layer` says what an LRP layer is; `affine`, `norms`, `products`, `activations` and `passing` hold them by their kind;
`notes` is what the graph does not tell, `walk` goes down it, `target` says where relevance starts.
"""

from athena.propagation import activations, affine, norms, passing, products

__all__ = ["activations", "affine", "norms", "passing", "products"]
