"""The tokens that a number chooses are those that the distribution says."""

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from align.errors import AlignError
from align.generation.draws import Decoding, choose, refuse_nan, uniforms


def decoding(**more) -> Decoding:
    return Decoding(max_new_tokens=8, stop_ids=(1,), **more)


def chosen_everywhere(logits: torch.Tensor, how: Decoding, points: int = 20_001) -> torch.Tensor:
    """Share of the unit interval that leads to each token."""
    uniform = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    tokens = choose(logits.expand(points, -1), uniform, how)
    return torch.bincount(tokens, minlength=logits.shape[-1]) / points


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 5},
        {"top_p": 0.8},
        {"temperature": 0.9, "top_k": 9, "top_p": 0.6},
        {"top_k": 1},
        {"top_p": 0.01},
        {"top_k": 1000},
    ],
)
def test_shares_are_those_of_the_warpers_of_transformers(options):
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(3)) * 2
    expected = TemperatureLogitsWarper(options.get("temperature", 1.0))(None, logits)
    if options.get("top_k"):
        expected = TopKLogitsWarper(options["top_k"])(None, expected)
    if options.get("top_p"):
        expected = TopPLogitsWarper(options["top_p"])(None, expected)
    found = chosen_everywhere(logits, decoding(**options))
    torch.testing.assert_close(found, expected.softmax(-1)[0], atol=1e-4, rtol=0)


def test_temperature_zero_takes_the_most_likely_token():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 1.0, 0.0]])
    assert choose(logits, torch.tensor([0.99, 0.99]), decoding(temperature=0)).tolist() == [1, 0]


def test_the_ends_of_the_unit_interval_never_choose_an_impossible_token():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    assert choose(logits, torch.tensor([0.0]).double(), decoding()).item() == 1
    # The sums of float32 probabilities lie a little beside 1; many rows meet every rounding.
    many = torch.randn(5000, 50, generator=torch.Generator().manual_seed(0))
    many[:, 40:] = -torch.inf
    highest = torch.full((5000,), float(np.nextafter(1.0, 0.0)), dtype=torch.float64)
    assert set(choose(many, highest, decoding()).tolist()) == {39}


def test_half_precision_logits_are_summed_exactly_enough_to_reach_rare_tokens():
    # A token with probability 1e-6 at the end of a flat vocabulary of 100,000.
    logits = torch.zeros(1, 100_001, dtype=torch.bfloat16)
    found = choose(logits, torch.tensor([1 - 5e-6], dtype=torch.float64), decoding())
    assert found.item() == 100_000


def test_logits_that_are_no_numbers_are_refused():
    broken = torch.tensor([[0.0, 1.0], [torch.nan, 1.0]])
    with pytest.raises(AlignError, match="no numbers \\(NaN\\)"):
        refuse_nan(choose(broken, torch.tensor([0.5, 0.5]).double(), decoding()), 2)
    refuse_nan(choose(broken[:1], torch.tensor([0.5]).double(), decoding()), 2)


def test_a_row_of_uniforms_depends_on_its_place_only():
    one = uniforms(7, [(3, 0), (3, 1), (4, 0)], 6)
    other = uniforms(7, [(4, 0), (3, 1)], 4)
    assert torch.equal(one[2, :4], other[0])
    assert torch.equal(one[1, :4], other[1])
    assert len({tuple(row.tolist()) for row in one}) == 3
    assert not torch.equal(one, uniforms(8, [(3, 0), (3, 1), (4, 0)], 6))


def test_uniforms_are_uniform_across_places():
    values = uniforms(0, [(prompt, sample) for prompt in range(50) for sample in range(8)], 50)
    counts, _ = np.histogram(values.numpy(), bins=20, range=(0, 1))
    expected = values.numel() / 20
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 43.8  # 0.999 quantile at 19 degrees of freedom
    assert float(values.min()) >= 0
    assert float(values.max()) < 1
