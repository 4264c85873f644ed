"""Structure: the facts about a model that initialization and findings ask for."""

from dataclasses import dataclass, field

from torch import fx, nn

from fastnorm.structure import activations, layers
from fastnorm.structure.activations import Activation
from fastnorm.structure.trace import Reader, ancestors, descend, trace


@dataclass(frozen=True)
class Branch:
    """A residual branch, x + branch(x): the layer or norm that ends it, and the block it is in."""

    end: str
    block: str


@dataclass
class Structure:
    """What follows what, by the names of modules."""

    following: dict[str, Activation | None] = field(default_factory=dict)
    """By layer: the activation that its output meets first, past norms, sums, views and pooling."""
    straight: dict[str, str] = field(default_factory=dict)
    """By layer or norm: the norm that takes its output, with nothing but views between."""
    branches: list[Branch] = field(default_factory=list)
    guessed: set[str] = field(default_factory=set)
    """Layers whose following activation is read from the order of the modules alone."""
    untraced: str = ""
    """Why torch.fx could not trace the model; empty where it could."""

    @property
    def blocks(self) -> int:
        """How many blocks the branches form.

        A ResNet's block adds one branch, a transformer's two, or three with cross-attention. A
        longer forward, and the model's own, is a loop over layers: a block at each sum.
        """
        owners = [branch.block for branch in self.branches]
        counts = {owner: owners.count(owner) for owner in owners}
        return sum(1 if owner and count <= 3 else count for owner, count in counts.items())


def read(model: nn.Module) -> Structure:
    """What follows what in `model`; nothing runs but its forward, on placeholders."""
    structure = Structure()
    try:
        graph = trace(model)
    except Exception as error:  # a forward may raise anything when its tensors have no values
        structure.untraced = f"{type(error).__name__}: {error}".splitlines()[0]
        _from_order(model, structure)
    else:
        _from_graph(Reader(model, graph), structure, lone=layers.is_unit(model))
    _from_composites(model, structure)
    return structure


def redundant_biases(model: nn.Module, structure: Structure | None = None) -> list[tuple[str, str]]:
    """(layer, norm) wherever a layer has a bias and the norm after it removes it again.

    BatchNorm and InstanceNorm subtract each channel's mean, and with it the bias; β serves instead.
    """
    facts = structure or read(model)
    modules = dict(model.named_modules())
    return [
        (layer, norm)
        for layer, norm in facts.straight.items()
        if isinstance(modules[norm], layers.PER_CHANNEL_NORMS)
        and isinstance(getattr(modules[layer], "bias", None), nn.Parameter)
        and isinstance(modules[layer], layers.LAYERS)
    ]


def double_norms(model: nn.Module, structure: Structure | None = None) -> list[tuple[str, str]]:
    """(norm, norm) wherever a norm's output is normalized again at once."""
    facts = structure or read(model)
    modules = dict(model.named_modules())
    return [
        (first, second)
        for first, second in facts.straight.items()
        if isinstance(modules[first], layers.NORMS)
    ]


def _from_graph(reader: Reader, structure: Structure, lone: bool) -> None:
    for node in reader.nodes:
        name = "" if lone else str(node.target)
        module = reader.module(node)
        parts = layers.fused_parts(module) if module is not None else None
        if module is not None and parts is not None:
            _fused(name, module, parts, structure)
        elif reader.is_layer(node):
            structure.following.setdefault(name, _following(reader, node))
        if reader.is_layer(node) or reader.is_norm(node):
            norm = _straight(reader, node)
            if norm is not None:
                source = _join(name, parts[1]) if parts else name
                structure.straight.setdefault(source, norm)
        branch = _branch(reader, node)
        if branch is not None:
            structure.branches.append(branch)


def _following(reader: Reader, node: fx.Node) -> Activation | None:
    def through(user: fx.Node) -> bool:
        norm = reader.is_norm(user) and activations.of_norm(reader.modules[str(user.target)])
        return (reader.passes(user) or reader.is_norm(user) or reader.is_sum(user)) and not norm

    for user in descend(node, through):
        found = reader.activation(user)
        if found is None and reader.is_norm(user):
            found = activations.of_norm(reader.modules[str(user.target)])
        if found is not None:
            return found
    return None


def _straight(reader: Reader, node: fx.Node) -> str | None:
    """The norm after `node`; None where something else sees the output too."""
    module = reader.modules[str(node.target)]
    parts = layers.fused_parts(module)
    last = getattr(module, parts[1]) if parts else module
    if activations.of_norm(last) is not None:
        return None  # its activation lies between
    while len(node.users) == 1:
        (node,) = node.users
        if reader.is_norm(node):
            only = len(node.all_input_nodes) == 1
            return str(node.target) if only else None
        if not reader.is_view(node):
            break
    return None


def _branch(reader: Reader, node: fx.Node) -> Branch | None:
    """The branch that ends at this sum: the side with more layers since the two parted."""
    best, most = None, 0
    pairs = reader.branch_and_skip(node)
    for end, skip in pairs:
        mine, other = ancestors(end), ancestors(skip)
        own = [n for n in mine - other if reader.is_layer(n)]
        if not any(n.op != "get_attr" for n in mine & other):
            continue  # they do not come from one place: no residual sum
        last = end
        while reader.passes(last) and len(last.all_input_nodes) == 1:
            last = last.all_input_nodes[0]
        if last in other or not (reader.is_layer(last) or reader.is_norm(last)):
            continue
        if len(own) == most:
            best = None  # two alike: neither is the skip
        elif len(own) > most:
            best, most = last, len(own)
    if best is None:
        return None
    name = str(best.target)
    module = reader.modules[name]
    parts = layers.fused_parts(module)
    if parts is not None:
        name = _join(name, parts[1])
    elif isinstance(module, nn.MultiheadAttention):
        name = _join(name, "out_proj")
    return Branch(name, reader.owner(node))


def _fused(name: str, module: nn.Module, parts: tuple[str, str], structure: Structure) -> None:
    layer, norm = (_join(name, part) for part in parts)
    structure.following[layer] = activations.of_norm(getattr(module, parts[1]))
    structure.straight[layer] = norm


def _from_order(model: nn.Module, structure: Structure) -> None:
    """Where there is no graph: the next activation defined, and neighbours in a Sequential."""
    units = [(name, module) for name, module in model.named_modules() if layers.is_unit(module)]
    waiting: list[str] = []
    for name, module in units:
        parts = layers.fused_parts(module)
        if parts is not None:
            _fused(name, module, parts, structure)
        activation = activations.of_module(module)
        if activation is None and isinstance(module, layers.NORMS):
            activation = activations.of_norm(module)
        if activation is not None:
            structure.following.update(dict.fromkeys(waiting, activation))
            waiting = []
        elif isinstance(module, layers.LAYERS):
            structure.following.setdefault(name, None)
            structure.guessed.add(name)
            waiting = [name]
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential):
            _neighbours(name, module, structure)


def _neighbours(name: str, sequence: nn.Sequential, structure: Structure) -> None:
    last = ""
    for part, module in sequence.named_children():
        if isinstance(module, layers.NORMS) and last:
            structure.straight.setdefault(last, _join(name, part))
        if isinstance(module, (*layers.LAYERS, *layers.NORMS)):
            last = "" if activations.of_norm(module) else _join(name, part)
        elif not isinstance(module, layers.VIEWS):
            last = ""


def _from_composites(model: nn.Module, structure: Structure) -> None:
    """Torch's transformer layers, which no trace looks into."""
    for name, module in model.named_modules():
        if not isinstance(module, layers.COMPOSITES):
            continue
        activation = module.activation
        structure.following[_join(name, "linear1")] = (
            activations.of_module(activation)
            if isinstance(activation, nn.Module)
            else activations.of_function(activation)
        )
        attentions = [
            part for part in ("self_attn", "multihead_attn") if getattr(module, part, None)
        ]
        ends = [f"{attention}.out_proj" for attention in attentions] + ["linear2"]
        structure.branches += [Branch(_join(name, end), name) for end in ends]
        for end in ends:
            structure.following[_join(name, end)] = None
        structure.guessed -= {_join(name, part) for part in (*ends, "linear1")}


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)
