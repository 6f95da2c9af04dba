"""The notebook docs/quickstart.ipynb, on the real model that packages ship."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from demo_model import skip_without_the_demo_model
from skvq import QuantizedDynamicCache

NOTEBOOK = Path(__file__).parent.parent / "docs" / "quickstart.ipynb"


@pytest.mark.model
def test_the_notebook_runs(capsys: pytest.CaptureFixture[str]) -> None:
    skip_without_the_demo_model()
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("no matplotlib: pip install 'skvq[eval]'")
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), names)
    assert isinstance(names["cache"], QuantizedDynamicCache)
    assert names["cache"].stats()["decoded"] == {}
    assert "18 layers, 3 packed" in capsys.readouterr().out
    divergence = {summary.method: summary.kl.mean for summary in names["report"].summaries()}
    assert divergence["skvq 4-bit"] < divergence["plan"] < divergence["KIVI 2-bit g32"]
    assert names["picture"].read_bytes()[:4] == b"\x89PNG"
