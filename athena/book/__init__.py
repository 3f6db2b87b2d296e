"""What the book's chapters call.

For every chapter: `figures`, `tables`, `widgets`, `parameters`, `answers` (with `answer` and
`answers_beyond`) and `timing`. For one chapter each, what it
draws, tabulates and says: `fundamentals`, `neurons`, `descent` and `convolutions` (1), `explaining` (2),
`worked_example`, `heatmaps`, `map_scores` and `libraries` (3), `own_model` (3), `one_batch`, `gradients`, `growth` and
`cost` (5), `mnist` (6), `cifar`, `epochs` and `two_networks` (7), `stopping` and
`stopping_effects` (8), `saving` (6 to 8), `verdicts` (9).
"""
