"""Window partition cropping (SAFNet, section 3.4): align on large crops, refine their windows as a larger batch."""

import torch
from torch import Tensor


def partition(pictures: Tensor, window: int) -> Tensor:
    """Cut pictures (N, C, H, W) into square windows (N * H/window * W/window, C, window, window).

    Windows follow one another picture by picture, each row by row. Raises ValueError if the sides are no multiples.
    """
    n, channels, height, width = pictures.shape
    if window < 1 or height % window or width % window:
        raise ValueError(f"window must divide the sides of {width}x{height} pictures, got {window}")
    rows, columns = height // window, width // window
    grid = pictures.reshape(n, channels, rows, window, columns, window).permute(0, 2, 4, 1, 3, 5)
    return grid.reshape(n * rows * columns, channels, window, window)


def unpartition(windows: Tensor, height: int, width: int) -> Tensor:
    """Put windows (N * k, C, side, side), as `partition` cuts them, together to pictures (N, C, height, width)."""
    count, channels, side, _ = windows.shape
    rows, columns = height // side, width // side
    if rows * side != height or columns * side != width or count % max(1, rows * columns):
        raise ValueError(f"{count} windows of {side} pixels must make up pictures of {width}x{height}")
    grid = windows.reshape(-1, rows, columns, channels, side, side).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(-1, channels, height, width)


def cut_windows(pictures: Tensor, window: int, chosen: Tensor | None = None) -> Tensor:
    """Windows of pictures (N, C, H, W): all of them, or of each picture those whose numbers `chosen` (N, k) holds."""
    windows = partition(pictures, window)
    if chosen is None:
        return windows
    first = torch.arange(len(pictures), device=chosen.device)[:, None] * (len(windows) // len(pictures))
    return windows[(first + chosen).flatten()]
