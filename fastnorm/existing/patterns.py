"""Runs of modules in a forward's graph that are one operation, and the graph rewritten with them.

    Linear | Conv -> BatchNorm [-> activation]
    BatchNorm | GroupNorm [-> + residual] [-> activation]      LayerNorm | RMSNorm -> activation
    + -> LayerNorm | RMSNorm

A run is rewritten only where nobody else sees what lies within it, and nothing in between changes
a tensor in place or calls the same module. `self` keeps its submodules; the graph asks for them.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx, nn

from fastnorm.existing import calls, nodes
from fastnorm.existing.foreign import ForeignRMSNorm
from fastnorm.modules.attributes import convolves_as, is_hooked
from fastnorm.structure import layers

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
FROM_INPUT = ("relu6", "leaky_relu", "elu")
"""Activations whose derivative torch takes from their input, ours at times from their output."""


@dataclass
class Fusion:
    """One run: its nodes in order, and the operation that they are."""

    nodes: list[fx.Node]
    parts: list[str]
    """The names of the modules in it, and of sums and functions."""
    norms: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return " → ".join(self.parts)


@dataclass
class Found:
    """What a graph holds: runs that are rewritten, and why others are not, by the norm's name."""

    fusions: list[Fusion] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def norm_kind(norm: nn.Module | None) -> str:
    """The family whose forward a module runs; empty where it is none, or overridden."""
    families = {"batch": calls.BATCH, "group": calls.GROUP, "layer": calls.LAYER, "rms": calls.RMS}
    forward = getattr(type(norm), "forward", None)
    forward = getattr(forward, "computes", forward)  # of a class that a foreign one is merged with
    for name, forwards in families.items():
        if norm is not None and forward in forwards:
            return "" if type(norm).__call__ is not nn.Module.__call__ else name
    return ""


class Graph:
    """A forward's graph with the modules that it calls."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.graph = graph
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.found = Found()

    def module(self, node: object) -> nn.Module | None:
        if isinstance(node, fx.Node) and node.op == "call_module":
            return self.modules.get(str(node.target))
        return None

    def find(self) -> Found:
        """Every run, nearest to the start first; each node is in one at most."""
        taken: set[fx.Node] = set()
        runs = [self._around_norm(node) for node in self.graph.nodes if self._kind(node)]
        runs += [self._sum_before(node) for node in self.graph.nodes if self._kind(node)]
        for run in runs:
            if run is not None and taken.isdisjoint(run.nodes):
                self.found.fusions.append(run)
                taken.update(run.nodes)
        self.found.fusions.sort(key=lambda run: self.order[run.nodes[0]])
        return self.found

    def _kind(self, node: fx.Node) -> str:
        """The family of a norm that is called with one tensor, and not listened to."""
        norm = self.module(node)
        kind = norm_kind(norm)
        if not kind or norm is None or not nodes.takes_one(node):
            return ""
        if is_hooked(norm):
            self._refuse(node, "it has hooks")
            return ""
        if getattr(norm, "attributes_changed", False):
            return ""
        return kind

    def _around_norm(self, node: fx.Node) -> Fusion | None:
        """The layer before a norm, the sum and the activation after it."""
        kind, norm = self._kind(node), self.module(node)
        run, parts = [node], [str(node.target)]
        plain = getattr(norm, "activation", "identity") == "identity"
        last = node
        if plain and kind in ("batch", "group"):
            last = self._sum_after(node)
            if last is not node:
                run, parts = [*run, last], [*parts, "+"]
        foreign = isinstance(norm, ForeignRMSNorm)
        if plain and not foreign:
            act = self._activation_after(last)
            if act is not None:
                run, parts = [*run, act], [*parts, self._name(act)]
        layer = node.args[0]
        if kind == "batch" and self._is_layer_for(node, layer) and "+" not in parts:
            run, parts = [layer, *run], [str(layer.target), *parts]  # type: ignore[list-item, union-attr]
        while len(run) > 1 and self._disturbed(run):
            if run[-1] is node:  # the layer before it
                return None
            run, parts = run[:-1], parts[:-1]
        return Fusion(run, parts, [str(node.target)]) if len(run) > 1 else None

    def _is_layer_for(self, node: fx.Node, layer: object) -> bool:
        """Whether `layer` is called for this norm alone, and can be one operation with it."""
        module = self.module(layer)
        if module is None or not isinstance(layer, fx.Node):
            return False
        if type(module) not in LAYERS:
            return False
        reason = ""
        if len(layer.users) > 1:
            reason = f"the output of {layer.target} is used elsewhere"
        elif is_hooked(module):
            reason = f"{layer.target} has hooks"
        elif not convolves_as(module, type(module)):
            reason = f"{layer.target} pads or convolves in a way of its own"
        elif not nodes.takes_one(layer):
            reason = f"{layer.target} is called in an unusual way"
        if reason:
            self._refuse(node, reason)
        return not reason

    def _sum_after(self, node: fx.Node) -> fx.Node:
        """The sum of a norm's output and something else; the norm itself where there is none."""
        users = list(node.users)
        if len(users) != 1 or not self._is_sum(users[0]):
            if len(users) > 1:
                self._refuse(node, "its output is used elsewhere")
            return node
        total = users[0]
        if nodes.SUMS[nodes.function(total)] and total.args[0] is not node:
            return node  # what is changed in place is not ours
        return total

    def _is_sum(self, node: fx.Node) -> bool:
        return (
            nodes.function(node) in nodes.SUMS
            and len(node.args) == 2
            and not node.kwargs
            and all(isinstance(one, fx.Node) for one in node.args)
            and node.args[0] is not node.args[1]
        )

    def _activation_after(self, node: fx.Node) -> fx.Node | None:
        if len(node.users) != 1:
            if len(node.users) > 1:
                self._refuse(node, "its output is used elsewhere")
            return None
        (user,) = node.users
        if self._activation(user) is None or user.args[0] is not node:
            return None
        module = self.module(user)
        if module is not None and is_hooked(module):
            self._refuse(node, f"{user.target} has hooks")
            return None
        if self._activation(user) in FROM_INPUT and self._is_overwritten(user):
            self._refuse(node, "the output of its activation is changed in place")
            return None
        return user

    def _is_overwritten(self, node: fx.Node) -> bool:
        """Whether what `node` returns is changed in place later."""
        return any(
            other is not node
            and self._changes(other)
            and any(node in nodes.roots(one) for one in other.all_input_nodes)
            for other in self.order
        )

    def _changes(self, node: fx.Node) -> bool:
        """Whether a function or method, or a module or one within it, changes what it is given."""
        module = self.module(node)
        inside = module.modules() if module is not None else ()
        return nodes.changes(node) or any(getattr(one, "inplace", False) for one in inside)

    def _activation(self, node: fx.Node) -> str | None:
        """The activation that a node is, with arguments that ours has too."""
        module = self.module(node)
        if module is not None:
            return nodes.module_activation(module) if nodes.takes_one(node) else None
        return nodes.function_activation(node)

    def _sum_before(self, node: fx.Node) -> Fusion | None:
        """The sum that a LayerNorm or RMSNorm takes; others may use it too."""
        if self._kind(node) not in ("layer", "rms"):
            return None
        total = node.args[0]
        if not isinstance(total, fx.Node) or not self._is_sum(total):
            return None
        if nodes.SUMS[nodes.function(total)] and not self._is_fresh(total.args[0], total):
            self._refuse(node, "the sum before it is in place, of a tensor that is used elsewhere")
            return None
        run = [total, node]
        if self._disturbed(run):
            return None
        return Fusion(run, ["+", str(node.target)], [str(node.target)])

    def _is_fresh(self, node: object, user: fx.Node) -> bool:
        """Whether `node` is a new tensor that `user` alone sees."""
        fresh = isinstance(self.module(node), (*layers.LAYERS, *layers.NORMS))
        return fresh and isinstance(node, fx.Node) and list(node.users) == [user]

    def _disturbed(self, run: list[fx.Node]) -> bool:
        """Whether anything between a run's nodes could tell that they moved together."""
        first, last = self.order[run[0]], self.order[run[-1]]
        moved = {self.module(node) for node in run} - {None}
        watched = set().union(
            *(nodes.roots(one) for node in run for one in [node, *node.all_input_nodes])
        )
        for node, index in self.order.items():
            if not first < index < last or node in run:
                continue
            module = self.module(node)
            inside = set(module.modules()) if module is not None else set()
            if moved & inside:
                return self._refuse_run(run, "it is called again in between")
            touched = (nodes.roots(one) for one in node.all_input_nodes)
            if self._changes(node) and not watched.isdisjoint(set().union(*touched)):
                return self._refuse_run(run, "a tensor is changed in place in between")
        return False

    def _refuse_run(self, run: list[fx.Node], reason: str) -> bool:
        for node in run:
            if norm_kind(self.module(node)):
                self._refuse(node, reason)
        return True

    def _refuse(self, node: fx.Node, reason: str) -> None:
        while not norm_kind(self.module(node)):  # a sum or activation: the norm before it
            node = node.all_input_nodes[0]
        self.found.refused.setdefault(str(node.target), reason)

    def _name(self, node: fx.Node) -> str:
        return str(node.target) if node.op == "call_module" else f"{nodes.function(node)}()"

    def rewrite(self) -> None:
        """Put each run's operation in its place."""
        for run in self.found.fusions:
            if run.parts[0] == "+":
                self._rewrite_sum(run)
            else:
                self._rewrite_norm(run)
        self.graph.lint()

    def _rewrite_sum(self, run: Fusion) -> None:
        total, node = run.nodes
        with self.graph.inserting_before(total):
            norm = self.graph.get_attr(str(node.target))
            both = self.graph.call_function(
                calls.add_norm, (norm, *total.args, nodes.SUMS[nodes.function(total)])
            )
            output = self.graph.call_function(operator.getitem, (both, 0))
            summed = self.graph.call_function(operator.getitem, (both, 1))
        node.replace_all_uses_with(output)
        total.replace_all_uses_with(summed)
        self._erase(run)

    def _rewrite_norm(self, run: Fusion) -> None:
        node = next(one for one in run.nodes if norm_kind(self.module(one)))
        last, norm_module = run.nodes[-1], self.module(node)
        activation = self._activation(last) or getattr(norm_module, "activation", "identity")
        with self.graph.inserting_before(last):
            norm = self.graph.get_attr(str(node.target))
            if run.nodes[0] is not node:
                layer = self.graph.get_attr(str(run.nodes[0].target))
                fused = self.graph.call_function(
                    calls.layer_norm_activation,
                    (layer, norm, run.nodes[0].args[0], activation),
                )
            else:
                total = next((one for one in run.nodes if self._is_sum(one)), None)
                in_place = total is not None and nodes.SUMS[nodes.function(total)]
                others = [] if total is None else [one for one in total.args if one is not node]
                fused = self.graph.call_function(
                    calls.norm_activation,
                    (norm, node.args[0], others[0] if others else None, activation, in_place),
                )
        last.replace_all_uses_with(fused)
        self._erase(run)

    def _erase(self, run: Fusion) -> None:
        for one in reversed(run.nodes):
            self.graph.erase_node(one)


def modules_of(run: Fusion, modules: Mapping[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    """(name, module) of the modules in a run."""
    return [(str(node.target), modules[str(node.target)]) for node in run.nodes
            if node.op == "call_module"]  # fmt: skip
