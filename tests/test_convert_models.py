"""Models of transformers and diffusers from configurations, and ours: converted against original.

Random weights, tiny sizes, nothing downloaded. Each is trained beside its original for two steps.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
from torch import Tensor, nn

import fastnorm

BODY = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
TEXT = BODY | {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
HEADS = {"num_key_value_heads": 2, "head_dim": 8}
PICTURE = BODY | {"image_size": 32, "patch_size": 8}
QUIET = {
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
UNET = {
    "block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1, "sample_size": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A model of a library: its class, configuration and input, and how many norms it has."""

    library: str
    kind: str
    options: dict[str, Any]
    norms: int
    fused: int
    """Of them, how many run as one operation with others."""
    inputs: str = "ids"

    def make(self) -> nn.Module:
        library = pytest.importorskip(self.library)
        torch.manual_seed(0)
        kind = getattr(library, self.kind)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.library == "diffusers":
                return kind(**self.options)
            return kind(getattr(library, self.kind.replace("Model", "Config"))(**self.options))

    def call(self, dtype: torch.dtype = torch.float32) -> Callable[[nn.Module], Tensor]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, 64, (2, 8), generator=generator)
        image = torch.randn(2, 3, 32, 32, generator=generator).to(dtype)
        calls: dict[str, Callable[[nn.Module], Any]] = {
            "ids": lambda model: model(ids, use_cache=False)[0],
            "no cache": lambda model: model(ids)[0],
            "both": lambda model: model(ids, decoder_input_ids=ids, use_cache=False)[0],
            "image": lambda model: model(image)[0],
            "timestep": lambda model: model(image[..., :16, :16], 3).sample,
            "autoencoder": lambda model: model(image[..., :16, :16]).sample,
        }
        return calls[self.inputs]


ZOO = {
    "BERT": Model("transformers", "BertModel", TEXT | QUIET, 5, 4, "no cache"),
    "GPT-2": Model(
        "transformers", "GPT2Model",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32,
         "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1,
         "eos_token_id": 2}, 5, 2,
    ),
    "Llama": Model("transformers", "LlamaModel", TEXT | {"num_key_value_heads": 2}, 5, 2),
    "Gemma": Model("transformers", "GemmaModel", TEXT | HEADS, 5, 2),
    "T5": Model(
        "transformers", "T5Model",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 64,
         "dropout_rate": 0.0}, 12, 0, "both",
    ),
    "ViT": Model("transformers", "ViTModel", PICTURE | QUIET, 5, 2, "image"),
    "ConvNeXt": Model(
        "transformers", "ConvNextModel",
        {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 2, 1]}, 10, 0, "image",
    ),
    "ResNet": Model(
        "transformers", "ResNetModel",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2],
         "layer_type": "bottleneck"}, 11, 11, "image",
    ),
    "Qwen": Model("transformers", "Qwen3Model", TEXT | HEADS, 9, 2),
    "UNet2DModel": Model(
        "diffusers", "UNet2DModel",
        UNET | {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8},
        0, 0, "timestep",
    ),
    "AutoencoderKL": Model(
        "diffusers", "AutoencoderKL",
        UNET | {"down_block_types": ("DownEncoderBlock2D",) * 2,
                "up_block_types": ("UpDecoderBlock2D",) * 2}, 0, 0, "autoencoder",
    ),
}  # fmt: skip


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
