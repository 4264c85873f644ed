"""What a node of a forward's graph does: adds, activates, changes a tensor, looks at one."""

from torch import fx, nn

from fastnorm.structure.forward import IN_PLACE

SUMS = {"add": False, "iadd": True, "add_": True}
"""Functions and methods that add; whether in place."""

ACTIVATION_FUNCTIONS = {
    "relu": "relu", "relu_": "relu", "relu6": "relu6", "leaky_relu": "leaky_relu",
    "leaky_relu_": "leaky_relu", "elu": "elu", "elu_": "elu", "silu": "silu", "gelu": "gelu",
    "tanh": "tanh", "tanh_": "tanh", "sigmoid": "sigmoid", "sigmoid_": "sigmoid",
    "hardswish": "hardswish",
}  # fmt: skip
FRESH = frozenset((
    "add", "sub", "rsub", "mul", "truediv", "div", "neg", "pow", "matmul", "bmm", "cat", "stack",
    "clone", "empty_like", "zeros_like", "ones_like", "mean", "sum", "relu", "silu", "gelu", "tanh",
    "sigmoid", "softmax", "exp", "sqrt",
))  # fmt: skip
"""Functions and methods that return memory of their own; others may return a view."""

# every argument that changes what they compute, with the value that ours has
ARGUMENTS = {"leaky_relu": ("negative_slope", 0.01), "elu": ("alpha", 1.0)}


def module_activation(module: nn.Module) -> str | None:
    """The activation of ours that a module of torch.nn computes exactly."""
    kinds: dict[type[nn.Module], str] = {
        nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Tanh: "tanh",
        nn.Sigmoid: "sigmoid", nn.Hardswish: "hardswish",
    }  # fmt: skip
    if type(module) in kinds:
        return kinds[type(module)]
    if type(module) is nn.LeakyReLU:
        return "leaky_relu" if module.negative_slope == 0.01 else None
    if type(module) is nn.ELU:
        return "elu" if module.alpha == 1.0 else None
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return None


def function_activation(node: fx.Node) -> str | None:
    """The activation that a function or method call is, with arguments that ours has too."""
    name = ACTIVATION_FUNCTIONS.get(function(node))
    if name is None or not node.args or is_foreign(node):
        return None
    options = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    options |= {str(index): value for index, value in enumerate(node.args[1:])}
    if name == "gelu" and set(options) == {"approximate"}:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(options["approximate"]))
    known, value = ARGUMENTS.get(name, ("", None))
    if known and (options == {known: value} or options == {"0": value}):
        return name
    return name if not options else None


def function(node: fx.Node) -> str:
    """The name of the function or method that a node calls; empty for other nodes."""
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_function":
        return str(getattr(node.target, "__name__", ""))
    return ""


def is_foreign(node: fx.Node) -> bool:
    """Whether a node calls a function that is not torch's nor Python's: its name says nothing."""
    if node.op != "call_function":
        return False
    module = str(getattr(node.target, "__module__", None))
    custom = module.startswith("torch._ops.") and module != "torch._ops.aten"
    return custom or module.split(".")[0] not in ("torch", "_operator", "builtins", "math")


def changes(node: fx.Node) -> bool:
    """Whether a function or method changes an argument, or may."""
    name = function(node)
    return (
        is_foreign(node)
        or name in (*IN_PLACE, "setitem")
        or (name.endswith("_") and not name.startswith("__"))
        or bool(node.kwargs.get("inplace"))
        or "out" in node.kwargs
    )


def takes_one(node: fx.Node) -> bool:
    return len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs


def roots(node: fx.Node) -> set[fx.Node]:
    """The nodes whose memory `node` may be: what functions were given that may return a view."""
    found, todo = {node}, [node]
    while todo:
        one = todo.pop()
        name = function(one)
        if name and (name not in FRESH or changes(one)):
            todo += set(one.all_input_nodes) - found
            found.update(one.all_input_nodes)
    return found
