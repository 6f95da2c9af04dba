"""The real model that PyPI packages ship, for tests that are skipped without it."""

import pytest

from skvq import models


def skip_without_the_demo_model() -> None:
    try:
        models.find_parts(models.GEMMA3_270M)
    except models.ExtraNotInstalledError as error:
        pytest.skip(str(error))
