"""One forward pass of a model as a torch.fx graph, in which layers and norms stay whole."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import fx, nn

from fastnorm.structure import activations, layers
from fastnorm.structure.activations import Activation
from fastnorm.structure.undrawn import undrawn


class _Tracer(fx.Tracer):
    def __init__(self, found: Mapping[nn.Module, Activation]) -> None:
        super().__init__()
        self.activations = found  # from before: a parameter is a placeholder now

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            return False
        known = (*layers.LAYERS, *layers.NORMS, *layers.COMPOSITES, *layers.FUSED)
        return (
            isinstance(m, known)
            or m in self.activations
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        inner = layers.wrapped(m)
        if inner:
            return m._modules[inner](*args, **kwargs)  # type: ignore[misc]
        return super().call_module(m, forward, args, kwargs)


def trace(model: nn.Module, found: Mapping[nn.Module, Activation]) -> fx.Graph:
    """The graph of `model(x, …)`, arguments with a default left at it.

    Raises:
        Exception: whatever the model raises where its forward asks for a tensor's values.
    """
    if layers.is_unit(model):  # a lone layer: its inside is torch's
        model = nn.Sequential(model)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is not parameter.empty
    }
    with warnings.catch_warnings(), undrawn():
        warnings.simplefilter("ignore")
        return _Tracer(found).trace(model, concrete_args=defaults or None)


class Reader:
    """Asks a graph's nodes what they are, by the model's modules."""

    def __init__(
        self, model: nn.Module, graph: fx.Graph, found: Mapping[nn.Module, Activation]
    ) -> None:
        whole = layers.is_unit(model)
        self.modules = {"0": model} if whole else dict(model.named_modules())
        self.nodes = list(graph.nodes)
        self.activations = found

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def function(self, node: fx.Node) -> str:
        """The name of the function or method that the node calls; empty for other nodes."""
        if node.op == "call_method":
            return str(node.target).rstrip("_")
        if node.op == "call_function":
            return str(getattr(node.target, "__name__", "")).rstrip("_")
        return ""

    def activation(self, node: fx.Node) -> Activation | None:
        module = self.module(node)
        if module is not None:
            return self.activations.get(module)
        if not self.function(node):
            return None
        slope = node.kwargs.get("negative_slope", node.args[1] if len(node.args) > 1 else None)
        return activations.of_function(self.function(node), slope)

    def is_layer(self, node: fx.Node) -> bool:
        return isinstance(self.module(node), (*layers.LAYERS, *layers.FUSED))

    def is_norm(self, node: fx.Node) -> bool:
        return isinstance(self.module(node), layers.NORMS)

    def is_sum(self, node: fx.Node) -> bool:
        return self.function(node) in layers.ADDITIONS and len(node.all_input_nodes) == 2

    def is_view(self, node: fx.Node) -> bool:
        return (
            isinstance(self.module(node), layers.VIEWS)
            or self.function(node) in layers.VIEW_FUNCTIONS
        )

    def keeps_axes(self, view: fx.Node) -> bool:
        return (
            isinstance(self.module(view), nn.Identity)
            or self.function(view) in layers.COPY_FUNCTIONS
        )

    def adds(self, norm: fx.Node) -> bool:
        """Whether a norm of fastnorm is given a residual."""
        return len(norm.args) + len(norm.kwargs) > 1

    def normalizes(self, norm: fx.Node, node: fx.Node) -> bool:
        """Whether `node` is what the norm takes, and no residual, nor summed with one before."""
        module = self.module(norm)
        given = [*norm.args, *norm.kwargs.values()]
        input = norm.kwargs.get("input", norm.args[0] if norm.args else None)
        first = module is not None and layers.adds_first(module)
        return input is node and given.count(node) == 1 and not (first and self.adds(norm))

    def passes(self, node: fx.Node) -> bool:
        """Whether the signal comes out much as it went in: views, dropout, pooling."""
        kinds = (*layers.VIEWS, *layers.DROPOUTS, *layers.POOLS)
        return (
            isinstance(self.module(node), kinds) or self.function(node) in layers.PASSING_FUNCTIONS
        )

    def branch_and_skip(self, node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
        """The pairs (candidate for a branch's end, what it is added to) of a sum; else none.

        A norm of fastnorm adds its residual itself; then the norm is the end of its branch.
        """
        if self.is_sum(node):
            one, other = node.all_input_nodes
            return [(one, other), (other, one)]
        module = self.module(node)
        inputs = node.all_input_nodes
        if self.is_norm(node) and module is not None and len(inputs) == 2:
            if layers.adds_first(module):
                return [(inputs[0], inputs[1]), (inputs[1], inputs[0])]
            return [(node, inputs[1])]
        return []

    def owner(self, node: fx.Node) -> str:
        """The name of the module whose forward holds this node."""
        stack = [name for name, _ in node.meta.get("nn_module_stack", {}).values()]
        if node.op == "call_module" and stack:
            stack.pop()
        return stack[-1] if stack else ""


def ancestors(node: fx.Node) -> set[fx.Node]:
    """Every node that `node` depends on, itself included."""
    found, todo = {node}, [node]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                todo.append(source)
    return found


def descend(node: fx.Node, through: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
    """Users of `node`, nearest first, and users of those for which `through(user)` holds."""
    todo, seen = list(node.users), {node}
    while todo:
        user = todo.pop(0)
        if user in seen:
            continue
        seen.add(user)
        yield user
        if through(user):
            todo += list(user.users)
