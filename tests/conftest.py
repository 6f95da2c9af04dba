"""Settings for all tests: no gradient, and few threads, so that tiny models do not wait for each other."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def without_gradient() -> Iterator[None]:
    """Tests run as generation does; those about gradients enable them."""
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True, scope="session")
def few_threads() -> Iterator[None]:
    """Tiny tensors gain nothing from more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
