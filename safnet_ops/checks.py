"""Argument checks that all operators share. Every message names the operator, the argument, what was expected and what came."""

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_tensor(operator: str, name: str, value: object, channels: int | None = None) -> None:
    """A floating-point tensor of four dimensions, with `channels` of them (any number if None) and pixels to read."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{operator}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{operator}: {name} must be float32, float64, float16 or bfloat16, got {value.dtype}")
    if value.dim() != 4:
        raise ValueError(f"{operator}: {name} must have 4 dimensions (N, C, H, W), got shape {tuple(value.shape)}")
    if channels is not None and value.shape[1] != channels:
        raise ValueError(
            f"{operator}: {name} must have {channels} channels (N, {channels}, H, W), got {tuple(value.shape)}"
        )


def check_shape(operator: str, name: str, value: Tensor, symbols: str, shape: tuple[int, ...]) -> None:
    """`value` has exactly `shape`, which `symbols` explains, as in "(N, 2, H, W)"."""
    if tuple(value.shape) != shape:
        raise ValueError(f"{operator}: {name} must be {symbols} = {shape}, got {tuple(value.shape)}")


def check_same_kind(operator: str, name: str, value: Tensor, model_name: str, model: Tensor) -> None:
    """`value` has the dtype and the device of `model`."""
    if value.dtype != model.dtype:
        raise TypeError(f"{operator}: {name} must be {model.dtype} like {model_name}, got {value.dtype}")
    check_device(operator, name, value, model_name, model)


def check_device(operator: str, name: str, value: Tensor, model_name: str, model: Tensor) -> None:
    if value.device != model.device:
        raise ValueError(f"{operator}: {name} must be on {model.device} like {model_name}, got {value.device}")


def unify_geometry(operator: str, image: Tensor, tensors: dict[str, Tensor]) -> list[Tensor]:
    """Bring flows and masks to the one dtype that a kernel takes beside `image`: the image's own, or else float32.

    Half-precision images may come with float32 flows and masks (a flow of 100 pixels needs more bits than bfloat16 has);
    float64 images need float64 ones, or precision would be lost unseen.
    """
    mixed = False
    for name, value in tensors.items():
        check_device(operator, name, value, "the image", image)
        if value.dtype != image.dtype:
            if torch.float64 in (value.dtype, image.dtype):
                raise TypeError(
                    f"{operator}: {name} must be float64 if and only if the image is: {image.dtype}, got {value.dtype}"
                )
            mixed = True
    return [value.to(torch.float32) for value in tensors.values()] if mixed else list(tensors.values())


def is_channels_last(tensor: Tensor) -> bool:
    """Whether an operator lays its output out with channels innermost: the rule that all kernels follow too."""
    return tensor.shape[1] > 1 and tensor.stride(1) == 1 and tensor.stride(3) >= tensor.shape[1]


def in_layout(out: Tensor, model: Tensor) -> Tensor:
    """What PyTorch computed, in the layout that kernels would have given it beside `model`."""
    # Not contiguous(memory_format=...), for which vmap has no rule.
    return out.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) if is_channels_last(model) else out


def empty_image(model: Tensor, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised dense tensor, channels_last where `model` is so laid out, with `model`'s shape unless given."""
    layout = torch.channels_last if is_channels_last(model) else torch.contiguous_format
    return torch.empty(
        tuple(model.shape) if shape is None else shape,
        dtype=dtype or model.dtype,
        device=model.device,
        memory_format=layout,
    )


def empty_gradient(model: Tensor, needed: bool) -> Tensor:
    """What a backward operator returns for one input: a tensor laid out by the common rule, or one of no elements."""
    return empty_image(model) if needed else model.new_empty(0)
