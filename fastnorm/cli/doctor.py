"""`fastnorm doctor`: what is installed, which backend serves what and why, and what is amiss."""

import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch

import fastnorm
import fastnorm.functional as FF
from fastnorm import environment, tables
from fastnorm.cli.arguments import Parser
from fastnorm.cli.environment import describe, versions
from fastnorm.eager.activations import OUTPUT_GRADS

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OLDEST_CAPABILITY = (8, 0)
OLDEST_TORCH, OLDEST_TRITON = (2, 9), (3, 5)
EXTRA = {"rich": "rich", "matplotlib": "matplotlib", "scikit-learn": "sklearn"}


@dataclass(frozen=True)
class Line:
    """One thing that was looked at; with a remedy where it is amiss."""

    thing: str
    found: str
    remedy: str = ""


def parser() -> Parser:
    """The options of `fastnorm doctor`: none."""
    return Parser(
        "fastnorm doctor",
        "Says what is installed, which backend serves each operation and dtype and why, and what "
        "is amiss, each with a remedy. Ends with status 1 where something is amiss.",
    )


def run(arguments: Namespace) -> int:
    """Prints all of it."""
    lines = [*_packages(), *_gpus(), *_triton(), *_cache(), *_choice()]
    width = max(len(line.thing) for line in lines)
    for line in lines:
        print(f"{line.thing:<{width}}  {line.found}")
    print()
    print(tables.text(("operation", *_names(DTYPES)), _served(), left=_names(DTYPES)))
    for reason in _reasons():
        print(reason)
    amiss = [line for line in lines if line.remedy]
    print()
    for line in amiss:
        print(f"AMISS {line.thing}: {line.found}\n      remedy: {line.remedy}")
    if not amiss:
        print("nothing is amiss")
    return int(bool(amiss))


def _names(dtypes: tuple[torch.dtype, ...]) -> tuple[str, ...]:
    return tuple(str(dtype)[6:] for dtype in dtypes)


def _packages() -> list[Line]:
    found = versions()
    lines = [Line("fastnorm", found["fastnorm"] or f"{fastnorm.__version__}, not installed")]
    lines.append(Line("python", f"{found['python']}, {platform.system()} {platform.machine()}"))
    old = _older(torch.__version__, OLDEST_TORCH)
    lines.append(Line("torch", torch.__version__, "pip install 'torch>=2.9'" if old else ""))
    for package, module in EXTRA.items():
        absent = importlib.util.find_spec(module) is None
        says = "not installed: train and study need it" if absent else str(found[package])
        remedy = "pip install 'fastnorm[cli]', or leave train and study alone" if absent else ""
        lines.append(Line(package, says, remedy))
    return lines


def _older(version: str, than: tuple[int, int]) -> bool:
    numbers = [int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit()]
    return len(numbers) == 2 and tuple(numbers) < than


def _gpus() -> list[Line]:
    """The processor, each GPU, and why there is none."""
    lines = [Line("processor", str(describe(torch.device("cpu"))["name"]))]
    built = torch.version.cuda or torch.version.hip
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            lines.append(_gpu(index))
    elif built:
        remedy = "" if not _has_gpu_files() else "install the driver that this torch was built for"
        lines.append(Line("GPU", f"none that torch can use (torch is built for {built})", remedy))
    else:
        remedy = "install torch built for CUDA or ROCm: pytorch.org" if _has_gpu_files() else ""
        lines.append(Line("GPU", "none: this torch is built for CPUs alone", remedy))
    return lines


def _has_gpu_files() -> bool:
    """Whether a GPU's driver has left its devices."""
    return any(Path(name).exists() for name in ("/dev/nvidia0", "/dev/kfd"))


def _gpu(index: int) -> Line:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    found = (
        f"{properties.name}, capability {capability[0]}.{capability[1]}, "
        f"{properties.multi_processor_count} multiprocessors, "
        f"{properties.total_memory / 2**30:.0f} GiB"
    )
    old = torch.version.hip is None and capability < OLDEST_CAPABILITY
    remedy = "kernels are compiled for 8.0 and above: FASTNORM_BACKEND=eager" if old else ""
    return Line(f"cuda:{index}", found, remedy)


def _triton() -> list[Line]:
    """Whether Triton can be imported, and build its launchers."""
    if not environment.has_triton:
        remedy = "pip install 'triton>=3.5'" if torch.cuda.is_available() else ""
        return [Line("triton", "not installed", remedy)]
    try:
        import triton
    except Exception as error:
        says = f"does not import: {type(error).__name__}: {error}"
        return [Line("triton", says, "reinstall the triton that this torch asks for")]
    old = _older(triton.__version__, OLDEST_TRITON)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    says = triton.__version__ + ", interpreting (TRITON_INTERPRET=1)" * interpreted
    remedy = "pip install 'triton>=3.5'" if old else ""
    if interpreted and torch.cuda.is_available():
        remedy = "unset TRITON_INTERPRET: the interpreter is for machines without a GPU"
    return [Line("triton", says, remedy), _compiler(), _headers()]


def _compiler() -> Line:
    """Triton compiles a launcher for each kernel in C."""
    asked = os.environ.get("CC")
    found = shutil.which(asked) if asked else shutil.which("gcc") or shutil.which("clang")
    if found:
        return Line("C compiler", found)
    says = f"CC={asked} is not there" if asked else "neither gcc nor clang on PATH"
    needed = torch.cuda.is_available()
    return Line("C compiler", says, "install gcc, or let CC name a compiler" if needed else "")


def _headers() -> Line:
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if header.exists():
        return Line("Python.h", str(header.parent))
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
    needed = torch.cuda.is_available()
    return Line("Python.h", "not found", f"install {package}" if needed else "")


def _cache() -> list[Line]:
    """Where Triton keeps what it compiled."""
    if not environment.has_triton:
        return []
    home = Path(os.environ.get("TRITON_HOME", Path.home()))
    folder = Path(os.environ.get("TRITON_CACHE_DIR", home / ".triton" / "cache"))
    problem = _unwritable(folder)
    if problem:
        remedy = "let TRITON_CACHE_DIR name a folder that you may write to"
        return [Line("kernel cache", f"{folder}: {problem}", remedy)]
    return [Line("kernel cache", str(folder))]


def _unwritable(folder: Path) -> str:
    """Why nothing can be written there, or in the nearest parent that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def _choice() -> list[Line]:
    """FASTNORM_BACKEND, and whether it can be had here."""
    name = environment.thread.name
    says = f"{name} (FASTNORM_BACKEND)" if "FASTNORM_BACKEND" in os.environ else name
    try:
        fastnorm.backend_for(torch.ones(1, device=_device()))
    except RuntimeError as error:
        return [Line("backend", says, str(error))]
    return [Line("backend", says)]


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _served() -> list[tuple[str, ...]]:
    """The backend of each operation and dtype on this machine's best device."""
    cells = []
    for dtype in DTYPES:
        try:
            cells.append(fastnorm.backend_for(torch.ones(1, dtype=dtype, device=_device())))
        except RuntimeError:
            cells.append("raises")
    return [(operation, *cells) for operation in FF.__all__]


def _reasons() -> list[str]:
    """Why, and what is served otherwise."""
    device, name = _device(), environment.thread.name
    try:
        serving = fastnorm.backend_for(torch.ones(1, device=device))
    except RuntimeError as error:
        return [f"on {device}: {error}"]
    if name == "eager":
        why = "eager: it was asked for by name"
    elif serving == "triton" and device.type == "cpu":
        why = "triton: it was asked for by name, and runs in Triton's interpreter, slowly"
    elif serving == "triton":
        why = "triton: a GPU's tensors of these dtypes are served by the kernels"
    elif device.type == "cpu":
        why = "eager: the kernels serve a GPU's tensors, and there is no GPU"
    else:
        why = "eager: Triton is not installed"
    return [
        f"on {device}: {why}",
        "always eager: empty tensors; inside torch.func transforms and forward-mode "
        "differentiation; tensors of other devices",
        "products with batch norm: torch's product, unless a model of flops and bytes finds a "
        f"fused way faster, which serves {', '.join(OUTPUT_GRADS)}",
    ]
