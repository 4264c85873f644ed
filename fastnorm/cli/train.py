"""`fastnorm train`: a real network on real images, with torch.nn's layers and with fastnorm's."""

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console

import fastnorm
from fastnorm.cli import report
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
from fastnorm.cli.environment import describe, versions
from fastnorm.cli.models import MODELS
from fastnorm.cli.output import default_folder, results_folder
from fastnorm.cli.progress import progress
from fastnorm.cli.training import Plan, Run, largest_difference, start, train

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parser() -> Parser:
    """The options of `fastnorm train`."""
    options = Parser(
        "fastnorm train",
        "Trains one network twice on the same batches, once with torch.nn's layers and once with "
        "fastnorm's, from the same weights, and compares the two.",
    )
    by_model = {
        name: ", ".join(f"{getattr(model, name)} for {key}" for key, model in MODELS.items())
        for name in ("epochs", "batch_size", "lr")
    }
    options.option("--model", Choice(tuple(MODELS)), default="resnet", help="the network")
    options.option("--data", Choice(tuple(DATASETS)), default="digits", help="the images")
    options.option(
        "--epochs", Whole(1), default=None, help="passes", default_help=by_model["epochs"]
    )
    options.option(
        "--batch-size", Whole(2), default=None, help="images a step", default_help=by_model["batch_size"]
    )
    options.option(
        "--lr", Positive(), default=None, help="first learning rate", default_help=by_model["lr"]
    )
    options.option("--seed", Whole(0, 2**63 - 1), default=0, help="of the weights and the batches")
    options.option("--device", device_choice(), default="auto", help="where to train")
    options.option("--dtype", Choice(tuple(DTYPES)), default="float32", help="bfloat16 is by autocast")
    return options
