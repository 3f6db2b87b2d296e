"""Attributions that should add up to a difference of outputs are held against it."""

import torch
from torch import Tensor

__all__ = ["IncompleteWarning", "missing"]

TOLERANCE = 0.01


class IncompleteWarning(UserWarning):
    """Attributions should add up to a difference of outputs, and miss it by more than 1 %."""


def missing(attributions: Tensor, difference: Tensor, context: str = "") -> str:
    """What to say where attributions (batch, ...) miss the `difference` (batch,) by more than 1 %; else ``""``.

    The sum of many rounded numbers is only as good as their size allows, and a difference may be near 0: misses below
    a thousandth of a percent of the largest attributions' sum do not count.
    """
    parts = attributions.detach().double().flatten(1)
    wanted = difference.detach().double()
    miss = (parts.sum(1) - wanted).abs()
    rounding = 2e-5 * parts.abs().sum(1) if attributions.dtype == torch.float32 else 1e-9 * parts.abs().sum(1)
    wrong = ~(miss <= TOLERANCE * wanted.abs() + rounding + 1e-6)
    if not wrong.any():
        return ""
    worst = int(torch.where(wrong, miss.nan_to_num(float("inf")), -1.0).argmax())
    return (
        f"the attributions of sample {worst} add up to {float(parts[worst].sum()):.6g}, but the output differs from "
        f"that for the baseline by {float(wanted[worst]):.6g}, which is more than 1 % off{context}"
    )
