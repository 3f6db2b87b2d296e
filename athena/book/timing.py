"""How long a guided training step takes beside a plain one, measured while the page is made."""

import copy
import random
import time
from collections.abc import Callable, Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from athena.guidance import Guidance
from athena.rules import Epsilon, Rule

RULE = Epsilon(1e-6)


def step_ratios(
    network: nn.Module, x: Tensor, scopes: Sequence[str], rounds: int, rule: Rule = RULE, seed: int = 0
) -> pd.DataFrame:
    """Seconds of a guided step over those of a plain one in the same round, for factor 0.1 and relevance of the logits.

    In each round every arm takes one step, in random order; one round more goes first, to warm up.

    Args:
        network: gives logits (batch, 10). Copies of it are trained.
        x: (batch, channels, h, w), the images of every step; the labels are drawn.
        scopes: for each arm which layers are guided, as for `athena.Guidance`.
        rounds: how many.
        rule, seed: of the guidance; of the order.

    Returns:
        One row a round, one column for each of `scopes`.
    """
    y, order, found = torch.randint(10, (len(x),)), random.Random(seed), []
    steps = {"plain": _step(network, None, rule), **{scope: _step(network, scope, rule) for scope in scopes}}
    for _ in range(rounds + 1):
        seconds = {arm: steps[arm](x, y) for arm in order.sample(list(steps), len(steps))}
        found.append([seconds[scope] / seconds["plain"] for scope in scopes])
    return pd.DataFrame(found[1:], columns=list(scopes))


def _step(network: nn.Module, scope: str | None, rule: Rule) -> Callable[[Tensor, Tensor], float]:
    """A training step on a copy of the network, which returns its seconds; plain where there is no scope."""
    network = copy.deepcopy(network).train()
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    if scope is not None:
        Guidance(network, factor=0.1, rule=rule, scope=scope, target="logits")

    def step(x: Tensor, y: Tensor) -> float:
        began = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
        return time.perf_counter() - began

    return step
