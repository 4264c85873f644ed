"""`fastnorm train`: a real network on real images, with torch.nn's layers and with fastnorm's."""

import io
from argparse import Namespace
from contextlib import nullcontext

import torch
from rich.console import Console

import fastnorm
from fastnorm.cli import comparison
from fastnorm.cli.arguments import (
    Choice,
    Folder,
    Parser,
    Positive,
    UsageError,
    Whole,
    device_choice,
    resolve_device,
)
from fastnorm.cli.data import DATASETS
from fastnorm.cli.models import MODELS
from fastnorm.cli.output import default_folder, results_folder
from fastnorm.cli.processes import Processes, joined, own_device
from fastnorm.cli.progress import progress
from fastnorm.cli.training import Plan, start, train

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parser() -> Parser:
    """The options of `fastnorm train`."""
    options = Parser(
        "fastnorm train",
        "Trains one network twice on the same batches, once with torch.nn's layers and once with "
        "fastnorm's, from the same weights, and compares the two. Started by torchrun, processes "
        "share each batch and average their gradients.",
    )
    options.option("--model", Choice(tuple(MODELS)), default="mlp", help="the network")
    options.option("--data", Choice(tuple(DATASETS)), default="digits", help="the images")
    options.option(
        "--epochs", Whole(1), otherwise=_of_models("epochs"), help="passes over the data"
    )
    options.option(
        "--batch-size", Whole(2), otherwise=_of_models("batch_size"), help="images in a step"
    )
    options.option("--lr", Positive(), otherwise=_of_models("lr"), help="first learning rate")
    options.option(
        "--seed", Whole(0, 2**63 - 1), default=0, help="of the weights and of the batches"
    )
    options.option("--device", device_choice(), default="auto", help="where to train")
    options.option(
        "--dtype", Choice(tuple(DTYPES)), default="float32", help="bfloat16 is by autocast"
    )
    options.flag(
        "--sync-bn",
        help="under torchrun: fastnorm's batch norms normalize over the batch of all processes; "
        "torch.nn's, which cannot on a CPU, over each process's part",
    )
    options.option(
        "--out", Folder(), otherwise="runs/train-MODEL-TIME", help="the folder for the results"
    )
    return options


def _of_models(name: str) -> str:
    """In words, the default that each model has for an option."""
    return ", ".join(f"{getattr(model, name)} for {key}" for key, model in MODELS.items())


def run(arguments: Namespace) -> int:
    """Trains both networks, fills the results folder, and prints the table."""
    device = own_device(resolve_device(arguments.device))
    with joined(device) as processes:
        return _run(arguments, device, processes)


def _run(arguments: Namespace, device: torch.device, processes: Processes) -> int:
    """The first of the processes writes and prints; the others only train."""
    plan = _plan(arguments, device, processes)
    backend = _backend(plan)
    speaks = processes.rank == 0
    folder = arguments.out or default_folder(f"train-{arguments.model}")
    with results_folder(folder) if speaks else nullcontext() as staging:
        runs = start(plan)
        steps = plan.epochs * plan.steps_per_epoch
        terminal = Console(stderr=True) if speaks else Console(file=io.StringIO())
        with progress(arguments.model, steps, terminal) as shown:
            train(plan, runs, shown)
        if staging is None:
            return 0
        asked = {name: value for name, value in vars(arguments).items() if name != "out"}
        asked["processes"] = processes.count
        table = comparison.table(f"{arguments.model} on {arguments.data}", runs)
        comparison.write(staging, asked, backend, runs, table)
    console = Console()
    console.print(table.on_terminal())
    console.print(f"results in {folder}", soft_wrap=True, highlight=False, markup=False)
    return 0


def _plan(arguments: Namespace, device: torch.device, processes: Processes) -> Plan:
    """The training that the arguments ask for; fills in the model's own defaults."""
    if arguments.sync_bn and processes.count == 1:
        raise UsageError(
            "argument --sync-bn: there is only one process "
            "(allowed: under torchrun --nproc-per-node 2, or more)"
        )
    model = MODELS[arguments.model]
    for name in ("epochs", "batch_size", "lr"):
        if getattr(arguments, name) is None:
            setattr(arguments, name, getattr(model, name))
    images = DATASETS[arguments.data]()
    count = len(images.train_labels)
    least = 2 * processes.count  # one image alone would have no variance to normalize by
    if not least <= arguments.batch_size <= count:
        raise UsageError(
            f"argument --batch-size: invalid value '{arguments.batch_size}' (allowed: "
            f"a whole number, {least} to {count}, all training images of {arguments.data})"
        )
    return Plan(
        model,
        images.to(device),
        arguments.epochs,
        arguments.batch_size,
        arguments.lr,
        arguments.seed,
        DTYPES[arguments.dtype],
        processes,
        arguments.sync_bn,
    )


def _backend(plan: Plan) -> str:
    """The backend that will serve the fastnorm run."""
    try:
        return fastnorm.backend_for(plan.images.train_images)
    except RuntimeError as error:  # FASTNORM_BACKEND asks for what this device cannot do
        raise UsageError(f"variable FASTNORM_BACKEND: {error}") from None
