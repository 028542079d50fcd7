import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safnet.training.windows import cut_windows, partition, unpartition


def test_windows_come_picture_by_picture_row_by_row():
    pictures = torch.arange(2 * 4 * 6.0).view(2, 1, 4, 6)
    windows = partition(pictures, 2)
    assert windows.shape == (12, 1, 2, 2)
    assert torch.equal(windows[1, 0], torch.tensor([[2.0, 3.0], [8.0, 9.0]]))
    assert torch.equal(windows[3], pictures[0, :, 2:, :2])
    assert torch.equal(windows[6], pictures[1, :, :2, :2])


@given(
    n=st.integers(1, 3),
    channels=st.integers(1, 4),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    side=st.integers(1, 5),
)
def test_windows_put_together_are_the_pictures(n, channels, rows, columns, side):
    pictures = torch.rand(n, channels, rows * side, columns * side)
    windows = partition(pictures, side)
    assert windows.shape == (n * rows * columns, channels, side, side)
    assert torch.equal(unpartition(windows, rows * side, columns * side), pictures)


def test_512_pixels_are_16_windows_of_128():
    assert partition(torch.zeros(2, 3, 512, 512), 128).shape == (32, 3, 128, 128)


def test_gradients_go_back_to_where_pixels_came_from():
    pictures = torch.zeros(1, 1, 4, 4, requires_grad=True)
    cut_windows(pictures, 2, torch.tensor([[1]])).sum().backward()
    expected = torch.zeros(4, 4)
    expected[:2, 2:] = 1
    assert torch.equal(pictures.grad[0, 0], expected)


def test_chosen_windows_are_those_of_their_picture():
    pictures = torch.rand(2, 3, 8, 8)
    windows = partition(pictures, 4)
    chosen = cut_windows(pictures, 4, torch.tensor([[0, 3], [2, 1]]))
    assert torch.equal(chosen, windows[[0, 3, 4 + 2, 4 + 1]])
    assert torch.equal(cut_windows(pictures, 4), windows)


def test_sides_that_do_not_fit():
    with pytest.raises(ValueError, match="window must divide the sides of 6x4 pictures, got 4"):
        partition(torch.zeros(1, 1, 4, 6), 4)
    with pytest.raises(ValueError, match=r"window must divide .* got 0"):
        partition(torch.zeros(1, 1, 4, 6), 0)
    with pytest.raises(ValueError, match="5 windows of 2 pixels must make up pictures of 4x4"):
        unpartition(torch.zeros(5, 1, 2, 2), 4, 4)
