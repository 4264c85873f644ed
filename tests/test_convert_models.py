"""Models of transformers and diffusers from configurations, and ours: converted against original.

Random weights, tiny sizes, nothing downloaded. Each is trained beside its original for two steps.
"""

import copy
import warnings

import pytest
import torch
from architectures import SMALL
from side_by_side import (
    assert_loads_both_ways,
    assert_same_tensors,
    assert_same_training,
    near,
    tensors_of,
)
from torch import nn
from zoo import TEXT, ZOO

import fastnorm


def rows_of(table: str) -> list[str]:
    return table.split("\n\n")[0].splitlines()[2:]


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name):
    model = ZOO[name]
    theirs, call = model.make(), model.call()
    ours = copy.deepcopy(theirs)
    before, keys = tensors_of(ours), list(theirs.state_dict())
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.0)
    assert fastnorm.convert(ours) is ours
    assert_same_tensors(before, ours)
    assert list(ours.state_dict()) == keys
    assert [type(one).__name__ for one in ours.modules()] == [
        type(one).__name__ for one in theirs.modules()
    ]
    assert_same_training(ours, theirs, call)
    assert_loads_both_ways(ours, theirs, call)
    optimizer.step()  # it holds these very parameters
    rows = rows_of(fastnorm.summary(ours))
    assert not [row for row in rows if "fastnorm" not in row]
    if model.norms:
        assert (len(rows), sum("fused" in row for row in rows)) == (model.norms, model.fused), rows
    else:
        assert len(rows) >= 10
    near(call(copy.deepcopy(ours).eval()), call(theirs.eval()))


@pytest.mark.parametrize("name", ["Llama", "Gemma", "T5", "ConvNeXt", "ResNet", "UNet2DModel"])
def test_zoo_in_bfloat16(name):
    """Not further from the same model in float64 than the original, but for rounding's luck."""
    model = ZOO[name]
    theirs = model.make().bfloat16().eval()
    ours = fastnorm.convert(copy.deepcopy(theirs))
    with torch.no_grad():
        exact = model.call(torch.float64)(copy.deepcopy(theirs).double())
        got, want = (model.call(torch.bfloat16)(one) for one in (ours, theirs))
    assert got.dtype == want.dtype
    error, theirs_error = ((one.double() - exact).square().mean().sqrt() for one in (got, want))
    assert error <= 1.5 * theirs_error


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_our_architectures_train(name, backend):
    """Also test_fuse.py; here with the kernels.

    One step in float64: ResNet's last norms see two values a channel, and amplify any rounding.
    """
    torch.manual_seed(0)
    theirs = SMALL[name]().to(backend, torch.float64)
    ours = fastnorm.convert(copy.deepcopy(theirs))
    x = torch.randn(2, 3, 32, 32, device=backend, dtype=torch.float64)
    assert_same_training(ours, theirs, lambda model: model(x), steps=1)


@pytest.mark.slow
def test_resnet50_in_full():
    """The real depths and rules, at a quarter of the width."""
    from architectures import ResNet50

    torch.manual_seed(0)
    theirs = ResNet50(16)
    ours = fastnorm.convert(copy.deepcopy(theirs))
    rows = rows_of(fastnorm.summary(ours))
    assert len(rows) == 53
    assert all("fused" in row for row in rows)
    x = torch.randn(4, 3, 64, 64)
    assert_same_training(ours.double(), theirs.double(), lambda model: model(x.double()), steps=1)
    folded = fastnorm.fold(theirs.eval())
    near(folded(x.double()), theirs(x.double()))
    assert not [one for one in folded.modules() if isinstance(one, nn.BatchNorm2d)]


@pytest.mark.slow
def test_gradient_checkpointing_and_generation():
    """What transformers does to its layers later: checkpoints them, feeds them a cache."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2)
    theirs = transformers.LlamaForCausalLM(config)
    ours = fastnorm.convert(copy.deepcopy(theirs))
    ids = torch.randint(3, 64, (2, 6))
    kwargs = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ours.eval().generate(ids, **kwargs), theirs.eval().generate(ids, **kwargs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the method has a newer name from some version on
        for model in (ours, theirs):
            model.gradient_checkpointing_enable()
        assert_same_training(ours, theirs, lambda model: model(ids).logits)
