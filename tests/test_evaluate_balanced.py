"""The balanced transforms as a method of the harness: fitted, counted, and closer in scores than what is not fitted."""

from __future__ import annotations

import pytest
import torch

from skvq.evaluate.calibration_rows import CalibrationRows
from skvq.evaluate.methods import Geometry, Where, parse_method
from skvq.evaluate.methods.balanced import Balanced
from skvq.evaluate.simulation import Simulator
from tiny_models import build

SINKS = 5


@pytest.fixture(scope="module")
def rows() -> CalibrationRows:
    """Two chunks of 600 tokens through a tiny model whose keys and queries share strong directions."""
    model = build("llama", max_position_embeddings=1024)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in model.base_model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                weight = projection.weight
                mix = torch.randn(weight.shape[0], 4, generator=generator)
                weight += 0.2 * mix @ torch.randn(4, weight.shape[1], generator=generator)
    chunks = [torch.randint(3, model.config.vocab_size, (600,), generator=generator) for _ in range(2)]
    return CalibrationRows(Simulator(model), chunks)


def score_error(method: Balanced, rows: CalibrationRows) -> float:
    """Mean squared error of the scores that decoded keys give, over the mean square of exact ones about their mean."""
    wrong = exact = 0.0
    for layer in rows.layers:
        for chunk in rows.of_layer(layer):
            keys = chunk.keys[None, :, SINKS : SINKS + 512]
            read = method.fake_quantize(keys, Where(layer, True, SINKS))
            queries = chunk.queries.flatten(1, 2)
            wrong += float((queries @ (read - keys)[0].mT).square().sum())
            exact += float((queries @ (keys - keys.mean(2, keepdim=True))[0].mT).square().sum())
    return wrong / exact


def test_fitted_transforms_lower_the_error_of_scores(rows: CalibrationRows) -> None:
    fitted = Balanced(key_bits=2, value_bits=2, unbiased=False)
    fitted.prepare(rows)
    plain = Balanced(
        key_bits=2, value_bits=2, unbiased=False, damping=1e6
    )  # so much damping leaves the Hadamard rotation
    plain.prepare(rows)
    error = score_error(fitted, rows)
    assert error < 0.9 * score_error(plain, rows)
    more = Balanced(key_bits=4, value_bits=4, unbiased=False)
    more.prepare(rows)
    assert score_error(more, rows) < 0.2 * error


def test_rows_keep_their_form_and_bits_are_counted(rows: CalibrationRows) -> None:
    method = parse_method("balanced:key_bits=2,value_bits=1.6")
    method.prepare(rows)
    chunk = next(rows.of_layer(rows.layers[0]))
    for keys in (True, False):
        given = (chunk.keys if keys else chunk.values)[None, :, SINKS : SINKS + 256]
        read = method.fake_quantize(given, Where(rows.layers[0], keys, SINKS))
        assert read.shape == given.shape
        assert 0.0 < float((read - given).norm() / given.norm()) < 0.7
    geometry = Geometry(0, 2, 128)
    assert method.bits(geometry, True) == pytest.approx(2 + 8 / 128 + 16 * 129 / (256 * 128))
    assert method.bits(geometry, False) == pytest.approx(8 * 26 / 128 + 8 / 128 + 16 * 129 / (256 * 128))


def test_bits_that_have_no_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="key_bits=8"):
        Balanced(key_bits=8)
