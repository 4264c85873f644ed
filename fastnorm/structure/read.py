"""Structure: the facts about a model that initialization and findings ask for."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import fx, nn

from fastnorm.structure import activations, layers
from fastnorm.structure.activations import Activation
from fastnorm.structure.behaviour import activations_of
from fastnorm.structure.trace import Reader, ancestors, descend, trace
from fastnorm.structure.unchanged import unchanged


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
    """By layer or norm: the norm that takes its output, at every call, with nothing but views
    between."""
    reshaped: set[str] = field(default_factory=set)
    """Those of `straight` with a view between that may move values to other axes."""
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
        ends: dict[str, list[str]] = {}
        for branch in self.branches:
            ends.setdefault(branch.block, []).append(branch.end)
        blocks = 0
        for owner, found in ends.items():
            calls = found.count(found[0])  # of a block that stands in several places
            blocks += calls if owner and len(found) <= 3 * calls else len(found)
        return blocks


def read(model: nn.Module) -> Structure:
    """What follows what in `model`; nothing runs but its forward, on placeholders.

    And, on a few numbers, the forward of modules that may be activations: see `behaviour`. The
    model is left as it was, whatever they set or count.
    """
    prefix = layers.wrapped(model)
    if prefix:
        return _renamed(read(model._modules[prefix]), prefix)  # type: ignore[arg-type]
    structure = Structure()
    with unchanged(model):
        found = activations_of(model)
        try:
            graph = trace(model, found)
        except Exception as error:  # a forward may raise anything when its tensors have no values
            structure.untraced = f"{type(error).__name__}: {error}".splitlines()[0]
    if structure.untraced:
        _from_order(model, structure, found)
    else:
        _from_graph(Reader(model, graph, found), structure, lone=layers.is_unit(model))
    _from_composites(model, structure, found)
    return structure


def _renamed(inner: Structure, prefix: str) -> Structure:
    """The same of a model that has this one inside, as its child `prefix`."""

    def name(of: str) -> str:
        return _join(prefix, of)

    return Structure(
        {name(layer): activation for layer, activation in inner.following.items()},
        {name(layer): name(norm) for layer, norm in inner.straight.items()},
        set(map(name, inner.reshaped)),
        [Branch(name(branch.end), name(branch.block)) for branch in inner.branches],
        set(map(name, inner.guessed)),
        inner.untraced,
    )


def _from_graph(reader: Reader, structure: Structure, lone: bool) -> None:
    met: dict[str, list[str | None]] = {}  # by layer: the norm after each of its calls
    for node in reader.nodes:
        name = "" if lone else str(node.target)
        module = reader.module(node)
        parts = layers.fused_parts(module) if module is not None else None
        if module is not None and parts is not None:
            _fused(name, module, structure)
        elif reader.is_layer(node):
            structure.following.setdefault(name, _following(reader, node))
        if reader.is_layer(node) or reader.is_norm(node):
            norm, reshaped = _straight(reader, node)
            source = _join(name, parts[1]) if parts else name
            met.setdefault(source, []).append(norm)
            if reshaped:
                structure.reshaped.add(source)
        branch = _branch(reader, node)
        if branch is not None:
            structure.branches.append(branch)
    for source, (norm, *others) in met.items():
        if norm is not None and all(other == norm for other in others):
            structure.straight[source] = norm


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


def _straight(reader: Reader, node: fx.Node) -> tuple[str | None, bool]:
    """The norm after `node`, and whether it was reshaped for it.

    None where something else sees the output too, or where it is a sum or an activation's.
    """
    module = reader.modules[str(node.target)]
    parts = layers.fused_parts(module)
    last = getattr(module, parts[1]) if parts else module
    if activations.of_norm(last) is not None or (reader.is_norm(node) and reader.adds(node)):
        return None, False
    reshaped = False
    while len(node.users) == 1:
        (user,) = node.users
        if reader.is_norm(user):
            return (str(user.target) if reader.normalizes(user, node) else None), reshaped
        if not reader.is_view(user):
            break
        reshaped = reshaped or not reader.keeps_axes(user)
        node = user
    return None, False


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


def _fused(name: str, module: nn.Module, structure: Structure) -> None:
    layer, norm = layers.fused_parts(module) or ("", "")
    structure.following[_join(name, layer)] = activations.of_norm(getattr(module, norm))
    structure.straight[_join(name, layer)] = _join(name, norm)


def _from_order(
    model: nn.Module, structure: Structure, found: Mapping[nn.Module, Activation]
) -> None:
    """Where there is no graph: the next activation defined, and neighbours in a Sequential."""
    waiting: list[str] = []
    seen: set[nn.Module] = set()
    for name, module in _everywhere(model):
        activation = found.get(module)
        if activation is None and isinstance(module, layers.NORMS):
            activation = activations.of_norm(module)
        if activation is not None:
            structure.following.update(dict.fromkeys(waiting, activation))
            waiting = []
        elif isinstance(module, (*layers.LAYERS, *layers.FUSED)) and module in seen:
            waiting = []  # it has its activation already
        elif isinstance(module, layers.FUSED):
            _fused(name, module, structure)
        elif isinstance(module, layers.LAYERS):
            structure.following.setdefault(name, None)
            structure.guessed.add(name)
            waiting = [name]
        seen.add(module)
    names = {module: name for name, module in model.named_modules()}
    met: dict[str, set[str]] = {}
    for module in names:
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            _neighbours(names, module, met, structure.reshaped)
    for layer, norms in met.items():
        if len(norms) == 1 and norms != {""}:
            structure.straight.setdefault(layer, *norms)


def _everywhere(
    module: nn.Module, name: str = "", above: tuple[nn.Module, ...] = ()
) -> Iterator[tuple[str, nn.Module]]:
    """All units, those that stand in several places in each of them."""
    if layers.is_unit(module):
        yield name, module
    for part, child in module._modules.items():
        if child is not None and child is not module and child not in above:
            yield from _everywhere(child, _join(name, part), (*above, module))


def _neighbours(
    names: dict[nn.Module, str],
    sequence: nn.Sequential,
    met: dict[str, set[str]],
    reshaped: set[str],
) -> None:
    """Add to `met`, by layer or norm, the norm after it at each of its places; "" for none."""
    last: nn.Module | None = None
    views: list[nn.Module] = []
    for module in [*sequence._modules.values(), None]:
        if isinstance(module, layers.VIEWS):
            views.append(module)
            continue
        if last is not None:
            after = names[module] if isinstance(module, layers.NORMS) else ""
            met.setdefault(names[last], set()).add(after)
            if not all(isinstance(view, nn.Identity) for view in views):
                reshaped.add(names[last])
        last, views = None, []
        if isinstance(module, (*layers.LAYERS, *layers.NORMS)) and not activations.of_norm(module):
            last = module


def _from_composites(
    model: nn.Module, structure: Structure, found: Mapping[nn.Module, Activation]
) -> None:
    """Torch's transformer layers, which no trace looks into."""
    for name, module in model.named_modules():
        if not isinstance(module, layers.COMPOSITES):
            continue
        activation = module.activation
        structure.following[_join(name, "linear1")] = (
            found.get(activation)
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
