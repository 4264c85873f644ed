"""What a module is to a signal: a layer with weights, a norm, or something that lets it pass."""

from torch import nn

from fastnorm.modules.layer_norm import AddLayerNorm, AddRMSNorm
from fastnorm.modules.linear_batch_norm import LinearBatchNorm, _ConvBatchNorm

CONVOLUTIONS = (nn.modules.conv._ConvNd,)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
LAYERS = (
    nn.Linear, nn.Bilinear, *CONVOLUTIONS, *EMBEDDINGS, *RECURRENT, nn.MultiheadAttention,
)  # fmt: skip
NORMS = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
)  # fmt: skip
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
PER_CHANNEL_NORMS = (nn.modules.batchnorm._NormBase,)  # those that remove a channel's mean
COMPOSITES = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
FUSED_CONVOLUTIONS = (_ConvBatchNorm,)
FUSED = (LinearBatchNorm, *FUSED_CONVOLUTIONS)

VIEWS = (nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle)
DROPOUTS = (nn.modules.dropout._DropoutNd,)
POOLS = (
    nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd, nn.Upsample,
)  # fmt: skip

COPY_FUNCTIONS = frozenset((
    "contiguous", "clone", "to", "float", "half", "bfloat16", "double", "type",
))  # fmt: skip
VIEW_FUNCTIONS = COPY_FUNCTIONS | frozenset((
    "flatten", "unflatten", "reshape", "view", "permute", "transpose", "swapaxes", "movedim",
    "squeeze", "unsqueeze", "t",
))  # fmt: skip
PASSING_FUNCTIONS = VIEW_FUNCTIONS | frozenset((
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "max_pool1d",
    "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "interpolate", "mean", "pad", "getitem",
))  # fmt: skip
ADDITIONS = frozenset(("add", "iadd"))


def fused_parts(module: nn.Module) -> tuple[str, str] | None:
    """Where `module` is a layer with its norm: the names of the two submodules."""
    if isinstance(module, LinearBatchNorm):
        return "linear", "norm"
    return ("conv", "norm") if isinstance(module, _ConvBatchNorm) else None


def wrapped(module: nn.Module) -> str:
    """The child that `module` calls with what it is given, itself nothing else; "" for none."""
    if "_orig_mod" in module._modules:  # torch.compile's
        return "_orig_mod"
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return "module" if isinstance(module, parallel) else ""


def adds_first(module: nn.Module) -> bool:
    """Whether a norm with a residual normalizes the sum, rather than adding to what it computed."""
    return isinstance(module, AddLayerNorm | AddRMSNorm)


def is_unit(module: nn.Module) -> bool:
    """Whether a model is read no further down than this module."""
    return isinstance(
        module, (*LAYERS, *NORMS, *COMPOSITES, *FUSED, *VIEWS, *DROPOUTS, *POOLS)
    ) or not any(True for _ in module.children())
