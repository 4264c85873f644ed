"""`fastnorm train`: a real network on real images, with torch.nn's layers and with fastnorm's."""

from argparse import Namespace

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
from fastnorm.cli.progress import progress
from fastnorm.cli.training import Plan, start, train

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parser() -> Parser:
    """The options of `fastnorm train`."""
    options = Parser(
        "fastnorm train",
        "Trains one network twice on the same batches, once with torch.nn's layers and once with "
        "fastnorm's, from the same weights, and compares the two.",
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
    options.option(
        "--out", Folder(), otherwise="runs/train-MODEL-TIME", help="the folder for the results"
    )
    return options


def _of_models(name: str) -> str:
    """In words, the default that each model has for an option."""
    return ", ".join(f"{getattr(model, name)} for {key}" for key, model in MODELS.items())


def run(arguments: Namespace) -> int:
    """Trains both networks, fills the results folder, and prints the table."""
    plan = _plan(arguments)
    backend = _backend(plan)
    folder = arguments.out or default_folder(f"train-{arguments.model}")
    with results_folder(folder) as staging:
        runs = start(plan)
        steps = plan.epochs * plan.steps_per_epoch
        with progress(arguments.model, steps, Console(stderr=True)) as shown:
            train(plan, runs, shown)
        asked = {name: value for name, value in vars(arguments).items() if name != "out"}
        table = comparison.table(f"{arguments.model} on {arguments.data}", runs)
        comparison.write(staging, asked, backend, runs, table)
    console = Console()
    console.print(table.on_terminal())
    console.print(f"results in {folder}", soft_wrap=True, highlight=False, markup=False)
    return 0


def _plan(arguments: Namespace) -> Plan:
    """The training that the arguments ask for; fills in the model's own defaults."""
    model = MODELS[arguments.model]
    for name in ("epochs", "batch_size", "lr"):
        if getattr(arguments, name) is None:
            setattr(arguments, name, getattr(model, name))
    images = DATASETS[arguments.data]()
    count = len(images.train_labels)
    if arguments.batch_size > count:
        raise UsageError(
            f"argument --batch-size: invalid value '{arguments.batch_size}' "
            f"(allowed: a whole number, 2 to {count}, all training images of {arguments.data})"
        )
    return Plan(
        model,
        images.to(resolve_device(arguments.device)),
        arguments.epochs,
        arguments.batch_size,
        arguments.lr,
        arguments.seed,
        DTYPES[arguments.dtype],
    )


def _backend(plan: Plan) -> str:
    """The backend that will serve the fastnorm run."""
    try:
        return fastnorm.backend_for(plan.images.train_images)
    except RuntimeError as error:  # FASTNORM_BACKEND asks for what this device cannot do
        raise UsageError(f"variable FASTNORM_BACKEND: {error}") from None
