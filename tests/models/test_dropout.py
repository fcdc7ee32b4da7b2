"""Dropout by counter: rates, independence, and the same mask however it is cut."""

import pytest
import torch

from plotarmour.models.dropout import CounterDropout

CPU = torch.device("cpu")


def mask(p=0.1, key=5, level=0, batch=2, heads=3, positions=64, neurons=256):
    dropout = CounterDropout(p, key, neurons, CPU)
    rows = dropout.rows(level, range(batch), range(heads), range(positions))
    return dropout.kept(rows, 0, neurons).double(), dropout, rows


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_the_share_kept_is_1_minus_p_everywhere(p):
    """Guards: rows, columns or heads that are dropped more often than others. Five standard deviations."""
    kept, dropout, _ = mask(p, batch=8, heads=4, positions=128, neurons=512)
    assert dropout.scale == pytest.approx(1 / (1 - p), rel=1e-4)
    for axes in ((0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):
        rates = kept.mean(axes)
        n = kept.numel() / rates.numel()
        assert float((rates - (1 - p)).abs().max()) <= 5 * (p * (1 - p) / n) ** 0.5 + 2**-16


def test_neighbours_are_dropped_independently():
    """Guards: four neurons of one hash that go together, rows or columns that repeat."""
    kept, _, _ = mask(0.5, batch=2, heads=2, positions=256, neurons=256)
    centred = kept.flatten(0, 1) - 0.5  # (4, 256, 256)
    n = centred.numel()
    for shift in range(1, 9):
        for axis in (0, 1, 2):
            if axis == 0 and shift > 3:
                continue
            correlation = float((centred * centred.roll(shift, axis)).mean() / 0.25)
            assert abs(correlation) < 5 / n**0.5, (shift, axis)
    by_neuron = torch.corrcoef(centred.flatten(0, 1).T).fill_diagonal_(0)
    assert float(by_neuron.abs().max()) < 6 / 1024**0.5


def test_every_coordinate_changes_the_mask():
    """Guards: a pass, row, head or step that is left out of the hash."""
    kept, dropout, _ = mask()
    others = [mask(key=6)[0], mask(level=1)[0], kept.roll(1, 0), kept.roll(1, 1), kept.roll(1, 2), kept.roll(1, 3)]
    for other in others:
        differing = float((kept != other).double().mean())
        assert differing == pytest.approx(2 * 0.1 * 0.9, abs=0.01)
    assert torch.equal(kept, mask()[0])


@pytest.mark.parametrize(("first", "last"), [(0, 256), (0, 2), (2, 10), (6, 254), (250, 256)])
def test_a_tile_has_the_mask_of_the_whole(first, last):
    """Guards: tiles that do not begin at a multiple of four."""
    kept, dropout, rows = mask()
    assert torch.equal(dropout.kept(rows, first, last).double(), kept[..., first:last])
    part = dropout.rows(0, range(1, 2), range(2, 3), range(10, 20))
    assert torch.equal(dropout.kept(part, first, last).double(), kept[1:2, 2:3, 10:20, first:last])


def test_the_mask_is_the_documented_hash():
    """Guards: another hash in a later version or on another device: a resumed run would not end with the same bits.

    Worked out here in whole numbers without bounds, cut to 64 bits by hand.
    """
    bits = 2**64 - 1
    golden, first, second = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

    def mix(z):
        z = (z ^ z >> 30) * first & bits
        z = (z ^ z >> 27) * second & bits
        return z ^ z >> 31

    def kept(key, level, batch, head, position, neuron, p):
        row = key
        for coordinate in (level, batch, head, position):
            row = mix(row ^ (coordinate + 1) * golden & bits)
        z = (row + mix(neuron // 4 * golden & bits)) * first & bits
        z ^= z >> 32 | (0xFFFFFFFF00000000 if z >> 63 else 0)  # torch shifts the sign in
        z = z * second & bits
        drawn = z >> 16 * (neuron % 4) & 0xFFFF
        return int((drawn - 2**16 if drawn >= 2**15 else drawn) >= round(p * 2**16) - 2**15)

    found, _, _ = mask(p=0.3, key=2**61 + 5, level=3, batch=2, heads=2, positions=9, neurons=30)
    for batch, head, position, neuron in torch.cartesian_prod(*(torch.arange(n) for n in found.shape)).tolist():
        assert int(found[batch, head, position, neuron]) == kept(2**61 + 5, 3, batch, head, position, neuron, 0.3)
