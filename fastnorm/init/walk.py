"""Walk: one pass over a model's modules, with the rule of each kind of layer."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils import parametrize

from fastnorm.init import schemes
from fastnorm.init.fans import Fans, fans, fans_of_shape
from fastnorm.init.report import Initialized
from fastnorm.structure import Activation, Structure, layers

SCHEMES = ("auto", "he", "xavier", "lecun", "orthogonal")
GATES: dict[type[nn.Module], int] = {
    nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3, nn.RNN: 1, nn.RNNCell: 1,
}  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """How a weight is drawn: `scheme` as in SCHEMES but for "auto", with a leaky ReLU's slope."""

    scheme: str
    slope: float
    relu: bool
    reason: str

    def draw(
        self, weight: Tensor, fan: Fans, generator: Generator | None, groups: int = 1
    ) -> tuple[str, float, float]:
        """Fill `weight`; (scheme in words, the fan of its variance, its standard deviation)."""
        if self.scheme == "he":
            schemes.he_normal_(weight, self.slope, fans=fan, generator=generator)
            return "he normal", fan.fan_in, _std(2 / (1 + self.slope**2), fan.fan_in)
        if self.scheme == "lecun":
            schemes.lecun_normal_(weight, fans=fan, generator=generator)
            return "lecun normal", fan.fan_in, _std(1.0, fan.fan_in)
        if self.scheme == "xavier":
            schemes.xavier_uniform_(weight, fans=fan, generator=generator)
            average = (fan.fan_in + fan.fan_out) / 2
            return "xavier uniform", average, _std(1.0, average)
        gain = math.sqrt(2 / (1 + self.slope**2)) if self.relu else 1.0
        schemes.orthogonal_(weight, gain, groups=groups, generator=generator)
        rows = weight.shape[0] // groups
        side = max(rows, weight[0].numel() if len(weight) else 0)
        return "orthogonal", side, _std(gain**2, side)


def rule(scheme: str, activation: Activation | None, note: str = "") -> Rule:
    """The rule that `scheme` means before this activation."""
    relu = activation is not None and activation.relu_like
    follows = f"{activation} follows" if activation else "no activation follows"
    chosen = scheme
    if scheme == "auto":
        chosen = "he" if relu else "xavier"
        if activation is not None and activation.name == "selu":
            chosen = "lecun"
    slope = activation.slope if activation is not None and relu else 0.0
    return Rule(chosen, slope, relu, follows + note)


class Walk:
    """Initializes each module of a model by its kind; `run()` gives the rows of the report."""

    def __init__(
        self, model: nn.Module, scheme: str, structure: Structure, generator: Generator | None
    ) -> None:
        self.model, self.scheme, self.structure = model, scheme, structure
        self.generator = generator
        self.rows: list[Initialized] = []
        self.owners = _owners(model)
        self.padding: dict[Any, int] = {
            module._parameters.get("weight"): module.padding_idx
            for module in model.modules()
            if isinstance(module, layers.EMBEDDINGS) and module.padding_idx is not None
        }

    @torch.no_grad()
    def run(self) -> list[Initialized]:
        for name, module in self.model.named_modules():
            if ".parametrizations." in f".{name}.":
                continue  # set through the layer that they belong to
            if isinstance(module, (nn.Linear, nn.Bilinear, *layers.CONVOLUTIONS)):
                self._layer(name, module)
            elif isinstance(module, layers.EMBEDDINGS):
                self._embedding(name, module)
            elif isinstance(module, layers.NORMS):
                self._norm(name, module)
            elif isinstance(module, layers.RECURRENT):
                self._recurrent(name, module)
            elif isinstance(module, nn.MultiheadAttention):
                self._attention(name, module)
            else:
                self._unknown(name, module, module._parameters)
        return self.rows

    def _layer(self, name: str, module: Any) -> None:
        guessed = ", by the order of the modules" if name in self.structure.guessed else ""
        how = rule(self.scheme, self.structure.following.get(name), guessed)
        if parametrize.is_parametrized(module, "weight"):
            self._parametrized(name, module, how)
        elif self._mine(name, module, "weight"):
            groups = getattr(module, "groups", 1)
            drawn = how.draw(module.weight, fans(module), self.generator, groups)
            reason = how.reason + self._padded(module.weight)
            self.rows.append(Initialized(name, *drawn, reason))
        bias, row = module.bias, _join(name, "bias")
        if parametrize.is_parametrized(module, "bias"):
            self._assigned(row, module, "bias", torch.zeros_like(bias))
        elif bias is not None:
            self._zero(row, bias)
        self._others(name, module)

    def _parametrized(self, name: str, module: Any, how: Rule) -> None:
        weight = torch.empty_like(module.weight)
        drawn = how.draw(weight, fans(module), self.generator, getattr(module, "groups", 1))
        if self._assigned(name, module, "weight", weight):
            reason = f"{how.reason}; through its parametrization"
            self.rows.append(Initialized(name, *drawn, reason))

    def _assigned(self, row: str, module: Any, part: str, value: Tensor) -> bool:
        """Assign a computed parameter, which torch inverts to the parameters behind it."""
        if not any(p.requires_grad for p in module.parametrizations[part].parameters()):
            self._kept(row, "frozen")
            return False
        try:
            setattr(module, part, value)
        except (NotImplementedError, RuntimeError):
            self._kept(row, "its parametrization has no inverse")
            return False
        return True

    def _embedding(self, name: str, module: Any) -> None:
        self._others(name, module)
        if not self._mine(name, module, "weight"):
            return
        nn.init.normal_(module.weight, 0.0, 1.0, self.generator)
        reason = "each output is a row" + self._padded(module.weight)
        self.rows.append(Initialized(name, "normal", 1.0, 1.0, reason))

    def _padded(self, weight: Tensor) -> str:
        """Nothing where a row stands for no token, also if an embedding shares the weight."""
        padding = self.padding.get(weight)
        if padding is None:
            return ""
        weight[padding] = 0.0
        return f"; row {padding} is padding, 0"

    def _norm(self, name: str, module: Any) -> None:
        own = {part: module._parameters.get(part) for part in ("weight", "bias")}
        found = [parameter for parameter in own.values() if parameter is not None]
        if found and not any(parameter.requires_grad for parameter in found):
            self._kept(name, "frozen")  # with the averages that belong to these weights
        else:
            if hasattr(module, "reset_running_stats"):
                module.reset_running_stats()
            done = []
            for (part, parameter), value in zip(own.items(), (1, 0), strict=True):
                if parameter is not None and parameter.requires_grad:
                    parameter.fill_(value)
                    done.append(f"{part} {value}")
                elif parameter is not None:
                    done.append(f"{part} frozen")
            if done:
                self.rows.append(Initialized(name, "norm", math.nan, math.nan, ", ".join(done)))
        self._others(name, module)

    def _recurrent(self, name: str, module: Any) -> None:
        """Input weights gate by gate; recurrent ones orthogonal, which keeps the state's norm."""
        kind = next((gates for base, gates in GATES.items() if isinstance(module, base)), 1)
        relu = "relu" in (
            getattr(module, "nonlinearity", ""),
            getattr(module, "mode", "")[-4:].lower(),
        )
        how = rule(self.scheme, Activation("relu" if relu else "tanh"))
        recurrent = Rule("orthogonal", 0.0, False, "recurrent: keeps the norm of the state")
        for part, parameter in module._parameters.items():
            if parameter is None:
                continue
            if part.startswith("bias_"):
                self._zero(_join(name, part), parameter)
            elif not part.startswith("weight_"):
                self._unknown(name, module, {part: parameter})
            elif self._mine(name, module, part):
                gates = 1 if part.startswith("weight_hr") else kind
                chosen = recurrent if part.startswith("weight_hh") else how
                self._blocks(_join(name, part), parameter.chunk(gates), chosen)

    def _attention(self, name: str, module: Any) -> None:
        """Query, key and value are projections of their own, in one weight or in three."""
        how = rule(self.scheme, None)
        for part, parameter in module._parameters.items():
            if parameter is None:
                continue
            if part == "in_proj_bias":
                self._zero(_join(name, part), parameter)
            elif not part.endswith("proj_weight"):
                self._unknown(name, module, {part: parameter})
            elif self._mine(name, module, part):
                blocks = parameter.chunk(3 if part == "in_proj_weight" else 1)
                self._blocks(_join(name, part), blocks, how)

    def _blocks(self, name: str, blocks: Iterable[Tensor], how: Rule) -> None:
        for block in blocks:
            drawn = how.draw(block, fans_of_shape(block), self.generator)
        self.rows.append(Initialized(name, *drawn, how.reason))

    def _others(self, name: str, module: nn.Module) -> None:
        """What a subclass has besides weight and bias."""
        known = ("weight", "bias")
        rest = {part: p for part, p in module._parameters.items() if part not in known}
        self._unknown(name, module, rest)

    def _unknown(
        self, name: str, module: nn.Module, parameters: Mapping[str, nn.Parameter | None]
    ) -> None:
        for part, parameter in parameters.items():
            if parameter is not None:
                reason = f"no rule for a parameter of {type(module).__name__}"
                self._kept(_join(name, part), reason)

    def _kept(self, row: str, reason: str) -> None:
        self.rows.append(Initialized(row, "kept", math.nan, math.nan, reason))

    def _mine(self, name: str, module: nn.Module, part: str) -> bool:
        """Whether this module's rule draws the parameter; if not, the report gets the reason."""
        parameter = module._parameters.get(part)
        row = _join(name, part) if part != "weight" else name
        if parameter is None:
            reason = f"{part} is computed from other parameters"
        elif not parameter.requires_grad:
            reason = "frozen"
        elif not parameter.is_floating_point() or parameter.itemsize == 1:  # torch draws no float8
            reason = f"of dtype {parameter.dtype}"
        elif self.owners[id(parameter)] != name:
            reason = f"the weight of {self.owners[id(parameter)] or '(model)'}"
            self.rows.append(Initialized(row, "tied", math.nan, math.nan, reason))
            return False
        else:
            return True
        self._kept(row, reason)
        return False

    def _zero(self, row: str, bias: Tensor) -> None:
        if bias.requires_grad:
            bias.zero_()
        elif isinstance(bias, nn.Parameter):
            self._kept(row, "frozen")


def _owners(model: nn.Module) -> dict[int, str]:
    """By parameter: the module whose rule draws it, a Linear or convolution before an embedding."""
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and not isinstance(module, layers.EMBEDDINGS):
                owners.setdefault(id(parameter), name)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), name)
    return owners


def _std(power: float, fan: float) -> float:
    return math.sqrt(power / fan) if fan else 0.0


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)
