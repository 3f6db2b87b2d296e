"""How good a heat map is: does it find the object, does the class depend on what it marks, does it show this network?

Three measures, none of them asking how a heat map was made: `localisation` against the object's known pixels,
`pixel_flipping` against the network's own answer, `randomisation` against the same network with other weights. Beside
each stands what a map that knows nothing would get. Not here: heat maps themselves (`athena.relevance`), and
intervals or tests over what is measured (`athena.statistics`).
"""

from athena.evaluation.flipping import Flipping, pixel_flipping
from athena.evaluation.localisation import localisation
from athena.evaluation.randomisation import Explain, randomisation

__all__ = ["Explain", "Flipping", "localisation", "pixel_flipping", "randomisation"]
