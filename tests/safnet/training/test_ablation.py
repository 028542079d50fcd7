import pytest
import torch

from safnet.model import Fusion, SAFNet
from safnet.training.ablation import PARTS, ablate

# So small a model only waits for more threads on a busy machine.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["small", "full"])
def model(request):
    torch.manual_seed(0)
    model = SAFNet(request.param)
    torch.nn.init.normal_(model.decoder.conv6.weight, std=0.2)  # visible flows
    return model


def train_a_little(model):
    """Two steps of what training uses, on a loss that wants everything to change."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    biases = [parameter for parameter in parameters if parameter.dim() == 1]
    weights = [parameter for parameter in parameters if parameter.dim() > 1]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, 0.01)
    exposures = torch.rand(3, 2, 6, 32, 32)
    for _ in range(2):
        optimizer.zero_grad()
        fusion = model.fuse(*exposures, model.estimate(*exposures))
        refined = model.refine(*exposures, fusion)
        (refined.sum() + fusion.fused.sum() + sum(part.sum() for part in fusion.alignment)).backward()
        optimizer.step()


def outputs(model, exposures):
    fusion = model.fuse(*exposures, model.estimate(*exposures))
    return fusion, model.refine(*exposures, fusion)


@pytest.mark.parametrize("part", PARTS)
def test_what_is_left_out_has_no_effect_before_and_after_training(model, part):
    ablate(model, [part])
    exposures = torch.rand(3, 1, 6, 32, 32)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for _ in range(2):
        with torch.no_grad():
            fusion, refined = outputs(model, exposures)
            alignment = fusion.alignment
            if part == "mask":
                assert (alignment.mask_short == 1).all()
                assert (alignment.mask_long == 1).all()
                assert alignment.flow_short.abs().max() > 0
            elif part == "flow":
                assert alignment.flow_short.abs().max() == 0
                assert alignment.flow_long.abs().max() == 0
                assert alignment.mask_short.std() > 0
            elif part == "refine":
                assert torch.equal(refined, fusion.fused.clamp(0, 1))
            else:
                features = torch.rand(1, 20 if model.variant == "full" else 6, 32, 32)
                other = Fusion(fusion.fused + 0.1, alignment)
                residuals = [model.refinenet((features,) * 2, exposures[1], seen) for seen in (fusion, other)]
                assert torch.equal(*residuals)
                assert residuals[0].std() > 0
        train_a_little(model)
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert any(name.startswith("encoder.") for name in changed)
    assert any(name.startswith("decoder.conv6.weight") for name in changed)
    assert any(name.startswith("refinenet.") for name in changed) == (part != "refine")


def test_without_mask_the_decoder_does_not_see_it(model):
    """Constant logits of up to 15 on its inputs would drown its features."""
    ablate(model, ["mask"])
    features = [torch.rand(1, 40, 8, 8) for _ in range(3)]
    from safnet.model import Alignment

    flows = [torch.zeros(1, 2, 8, 8)] * 2
    results = [model.decoder(*features, Alignment(*flows, *[torch.full((1, 1, 8, 8), m)] * 2)) for m in (0.0, 15.0)]
    assert torch.equal(results[0].flow_short, results[1].flow_short)


def test_both_may_be_left_out(model):
    ablate(model, ["flow", "refine"])
    exposures = torch.rand(3, 1, 6, 32, 32)
    fusion, refined = outputs(model, exposures)
    assert fusion.alignment.flow_long.abs().max() == 0
    assert torch.equal(refined, fusion.fused.clamp(0, 1))
