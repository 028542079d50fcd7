"""Frames in the bits of their files, as the network reads them."""

import pytest
import torch

from safnet.radiance import ExposureReader, Frame, StoredFrame, exposure_input, ldr_values

HEIGHT, WIDTH = 9, 14


def _frame(kind: str) -> Frame:
    random = torch.Generator().manual_seed(1)
    if kind == "float32":
        return torch.rand(1, 3, HEIGHT, WIDTH, generator=random)
    dtype = getattr(torch, kind.removeprefix("stored "))
    codes = torch.randint(0, torch.iinfo(dtype).max + 1, (1, HEIGHT, WIDTH, 3), generator=random).to(dtype)
    codes = codes.permute(0, 3, 1, 2)  # channels innermost, as files hold them
    if not kind.startswith("stored"):
        return codes
    return StoredFrame(codes, torch.rand(torch.iinfo(dtype).max + 1, generator=random))


@pytest.mark.parametrize("kind", ["float32", "uint8", "uint16", "stored uint8", "stored uint16"])
def test_a_reader_gives_what_the_protocol_says_of_every_form(kind):
    frame, rows, columns = _frame(kind), slice(2, 7), slice(3, 14)
    read = ExposureReader(frame, 4.0, torch.sqrt).read(rows, columns)
    expected = exposure_input(ldr_values(frame)[..., rows, columns].sqrt(), 4.0)
    torch.testing.assert_close(read, expected, rtol=0, atol=1e-6)
