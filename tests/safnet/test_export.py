"""The exported model: one program for all sizes, and gradients of its parameters."""

import pytest
import torch

from safnet.model import SAFNet

SIZES = [(64, 64), (33, 47), (100, 160), (90, 70)]
LEAST = 33  # sides of 32 pixels and less are traced as another program


def exposures(size):
    return [torch.rand(1, 6, *size) for _ in range(3)]


def any_size(dimension):
    return {name: {2: dimension("height"), 3: dimension("width")} for name in ("short", "reference", "long")}


def named(name):
    return torch.export.Dim(name, min=LEAST, max=4000)


def automatic(name):
    return torch.export.Dim.AUTO


@pytest.mark.parametrize("dimension", [named, automatic])
@pytest.mark.parametrize("variant", ["full", "small"])
@torch.no_grad()
def test_a_program_of_dynamic_size_is_exact(variant, dimension):
    model = SAFNet(variant).eval()
    program = torch.export.export(model, tuple(exposures((70, 90))), dynamic_shapes=any_size(dimension))
    exported = program.module()
    for size in SIZES:
        given = exposures(size)
        for found, expected in zip(exported(*given), model(*given), strict=True):
            assert (found - expected).abs().max() < 1e-4


def test_a_size_below_the_least_is_refused():
    with torch.no_grad():
        program = torch.export.export(SAFNet("small"), tuple(exposures((70, 90))), dynamic_shapes=any_size(named))
    with pytest.raises(AssertionError, match="Guard failed"):
        program.module()(*exposures((30, 40)))


def test_parameters_of_an_exported_model_have_gradients():
    model, given = SAFNet("small"), exposures((40, 50))
    exported = torch.export.export(model, tuple(given)).module()
    for module in (model, exported):
        fused, refined = module(*given)
        (fused.sum() + refined.square().sum()).backward()
    for (name, parameter), other in zip(model.named_parameters(), exported.parameters(), strict=True):
        assert other.grad is not None, name
        torch.testing.assert_close(other.grad, parameter.grad, msg=name)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_package_of_dynamic_size_is_exact(tmp_path):
    """AOTInductor keeps no guards: a size that was frozen would give wrong results in silence."""
    model = SAFNet("small").eval()
    program = torch.export.export(model, tuple(exposures((70, 90))), dynamic_shapes=any_size(named))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    for size in SIZES:
        given = exposures(size)
        for found, expected in zip(compiled(*given), model(*given), strict=True):
            assert (found - expected).abs().max() < 1e-4
