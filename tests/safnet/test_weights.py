"""Loading and saving of weights: files that fit, and files that do not."""

import os

import pytest
import torch
from safetensors.torch import save_file

from safnet import SAFNet, WeightsError, load_model, save_model


@pytest.fixture(params=["full", "small"])
def model(request):
    torch.manual_seed(0)
    return SAFNet(request.param)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_round_trip(model, suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    if suffix == ".pth":
        torch.save(model.state_dict(), path)
    else:
        save_model(model, path, {"steps": "7"})
    loaded = load_model(path)
    assert loaded.variant == model.variant
    assert not loaded.training
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_who_may_read_the_file_follows_the_umask(umask, mode, tmp_path):
    path = tmp_path / "model.safetensors"
    before = os.umask(umask)
    try:
        save_model(SAFNet("small"), path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize(("name", "variant"), [("safnet-s", "small"), ("safnet", "full")])
def test_shipped_models(name, variant):
    model = load_model(name)
    assert model.variant == variant
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.refinenet.residual_layer.weight.any()


def test_unknown_name():
    with pytest.raises(WeightsError, match=r"model 'safnet-xl' is neither shipped \(there are: .*safnet-s.*\) nor a"):
        load_model("safnet-xl")


def test_missing_file(tmp_path):
    with pytest.raises(WeightsError, match="does not exist"):
        load_model(tmp_path / "none.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 truncated"])
def test_broken_file(suffix, content, tmp_path):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"broken\..* cannot be read: "):
        load_model(path)


def test_truncated_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(SAFNet("small"), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match="cannot be read"):
        load_model(path)


def test_misfit_lists_keys_and_shapes(tmp_path):
    state = SAFNet("small").state_dict()
    state["decoder.conv6.weight"] = torch.zeros(120, 8, 4, 4)
    state["extra"] = torch.zeros(1)
    del state["encoder.pyramid1.0.0.bias"]
    path = tmp_path / "misfit.safetensors"
    save_file(state, path)
    with pytest.raises(WeightsError) as error:
        load_model(path)
    message = str(error.value)
    assert "1 missing: encoder.pyramid1.0.0.bias" in message
    assert "1 unexpected: extra" in message
    assert "decoder.conv6.weight (120, 8, 4, 4) instead of (120, 6, 4, 4)" in message


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    path = tmp_path / "bomb.pth"
    torch.save({"encoder": Bomb()}, path)
    with pytest.raises(WeightsError, match="cannot be read"):
        load_model(path)
    assert not (tmp_path / "exploded").exists()


def test_pickle_that_is_no_state_dict(tmp_path):
    path = tmp_path / "list.pth"
    torch.save([1, 2], path)
    with pytest.raises(WeightsError, match="must hold a state dict of tensors, got list"):
        load_model(path)
