"""The counter of live bytes, on real tensors whose sizes are known."""

import torch

from molf.planning.live_bytes import LiveBytes
from molf.planning.measure import PeakBytes


def test_storages_count_once_and_until_they_are_freed():
    with LiveBytes() as counter:
        a = torch.empty(1000)
        view = a.view(10, 100)[2:]
        assert counter.now == 4000
        b = a + 1
        assert counter.now == 8000
        del a
        assert counter.now == 8000  # the view keeps it
        del view
        assert counter.now == 4000
        del b
        assert counter.now == 0
    assert counter.peak == 8000


def test_known_tensors_do_not_count():
    weight = torch.empty(500)
    with LiveBytes([weight]) as counter:
        weight.view(5, 100).mul_(2)
        assert counter.now == counter.peak == 0


def test_gradients_of_a_tied_weight_are_added_in_place():
    """As autograd does when nobody watches: a third gradient is never there."""
    weight = torch.randn(100, 50, requires_grad=True)
    rows = torch.arange(4)
    with LiveBytes([weight]) as counter:
        hidden = torch.nn.functional.embedding(rows, weight)
        (hidden @ weight.t()).sum().backward()
    size = weight.numel() * 4
    assert 2 * size < counter.peak < 2.5 * size
    expected = torch.zeros_like(weight)
    expected[:4] += weight.detach().sum(0)
    expected += weight.detach()[:4].sum(0)
    torch.testing.assert_close(weight.grad, expected)


def test_peak_bytes_of_a_cpu():
    held = torch.zeros(1000)
    peak = PeakBytes(torch.device("cpu"), [held, held.view(10, 100)])
    with peak:
        a = torch.empty(5000)
        del a
        b = torch.empty(2000)
    del b
    assert 4 * 6000 <= peak.bytes < 4 * 6000 + 256
