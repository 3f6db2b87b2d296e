"""What every test shares: one thread, reproducible examples."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("athena", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("athena")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
