"""Figures are drawn from the data given, and refuse what does not fit."""

import pytest
import torch

import frfx
from frfx import plot


def test_maps_hold_the_values(tmp_path):
    forward, target = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    figure = plot.feature_maps(forward, target, images=torch.rand(2, 1, 8, 8), channels=2)
    drawn = {
        axis.get_title(): axis.images[0].get_array() for axis in figure.axes if axis.get_title()
    }
    assert set(drawn) == {
        "input", "forward 0", "forward 1", "reconstructed 0", "reconstructed 1",
        "|difference| 0", "|difference| 1",
    }  # fmt: skip
    torch.testing.assert_close(torch.as_tensor(drawn["forward 1"].data), forward[0, 1])
    torch.testing.assert_close(
        torch.as_tensor(drawn["|difference| 0"].data), (forward - target).abs()[0, 0]
    )
    figure.savefig(tmp_path / "maps.png")
    assert (tmp_path / "maps.png").stat().st_size > 1000


def test_vectors_are_drawn_as_one_map():
    vector = torch.arange(10.0).expand(2, 10)
    figure = plot.feature_maps(vector, vector)
    assert figure.axes[0].images[0].get_array().shape == (4, 3)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 3, 5)])
def test_shapes_that_do_not_fit(shape):
    with pytest.raises(frfx.InputError, match="expected"):
        plot.feature_maps(torch.zeros(2, 3, 5), torch.zeros(shape))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"captions": ["one"]}, "1 captions for 2 features"),
        ({"images": torch.zeros(0, 1, 4, 4)}, "0 images for 2 features"),
        ({"channels": 0}, "nothing to draw of 2 samples and 0 channels"),
    ],
)
def test_what_is_missing(options, text):
    with pytest.raises(frfx.InputError, match=text):
        plot.feature_maps(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), **options)
