"""Models of transformers and diffusers, tiny, from configurations; random weights, no download."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
