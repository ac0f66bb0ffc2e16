"""Small convolutional networks that show what is inside them."""

from __future__ import annotations

import torch

from kd_helpers.methods.digit_cnns import digit_cnn


def test_a_network_shows_its_maps_its_embedding_and_its_logits():
    seen = digit_cnn((4, 8, 12), seed=0)(torch.rand(5, 64))
    assert [tuple(made.shape) for made in seen.maps] == [(5, 4, 8, 8), (5, 8, 4, 4), (5, 12, 2, 2)]
    assert seen.embedding.shape == (5, 12)
    assert seen.logits.shape == (5, 10)
    torch.testing.assert_close(seen.embedding, seen.maps[-1].mean(dim=(2, 3)))


def test_the_seed_draws_the_weights_and_nothing_else():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, again, other = (digit_cnn((2, 3), seed=seed) for seed in (0, 0, 1))
    assert torch.rand(1) == expected
    assert all((a == b).all() for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not (one.head.weight == other.head.weight).all()
