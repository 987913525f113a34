"""What every process has to agree on."""

import torch

from align.training.sharding import all_finite


def test_only_trained_weights_have_to_be_finite():
    model = torch.nn.Linear(2, 1)
    assert all_finite(model)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    assert not all_finite(model)
    model.weight.requires_grad_(False)
    assert all_finite(model)
    assert all_finite(model.requires_grad_(False))
