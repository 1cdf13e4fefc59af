"""The cache that appends in place holds what transformers' own does, and keeps windowed layers."""

import torch
from transformers import Qwen3Config
from transformers.cache_utils import DynamicLayer

from rollouts.engines.cache import GrowingLayer, growing_cache


def test_it_holds_what_the_plain_layer_does():
    torch.manual_seed(0)
    plain, growing = DynamicLayer(), GrowingLayer()
    rows = 6
    for count in (7, 1, 1, 30, *[1] * 60):
        keys, values = torch.randn(rows, 2, count, 4), torch.randn(rows, 2, count, 4)
        expected, held = plain.update(keys, values), growing.update(keys, values)
        assert all(torch.equal(a, b) for a, b in zip(expected, held))
        assert plain.get_seq_length() == growing.get_seq_length()
        if count == 30:
            kept = torch.tensor([0, 2, 5])
            plain.batch_select_indices(kept)
            growing.batch_select_indices(kept)
            rows = len(kept)


def test_it_appends_in_place():
    layer = GrowingLayer()
    layer.update(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2))
    before = layer.keys.data_ptr()
    layer.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))
    assert layer.keys.data_ptr() == before


def test_windowed_layers_stay_as_they_are():
    config = Qwen3Config(
        num_hidden_layers=2, use_sliding_window=True, sliding_window=4, max_window_layers=1
    )
    kinds = [type(layer).__name__ for layer in growing_cache(config).layers]
    assert kinds[0] == "GrowingLayer" and "Sliding" in kinds[1]
