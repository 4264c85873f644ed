"""`fastnorm study`: what normalization and initialization do, on small networks and real images."""

import importlib
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console

from fastnorm import tables
from fastnorm.cli import report
from fastnorm.cli.arguments import Choice, Folder, Parser, Whole
from fastnorm.cli.environment import describe, versions
from fastnorm.cli.output import default_folder, results_folder
from fastnorm.cli.progress import progress
from fastnorm.cli.studies import STUDIES
from fastnorm.cli.studies.outcome import Outcome, Settings

SEEDS, QUICK_SEEDS = 3, 2


def parser() -> Parser:
    """The options of `fastnorm study`."""
    listed = "; ".join(f"{name}: {summary}" for name, summary in STUDIES.items())
    options = Parser(
        "fastnorm study",
        f"Trains or runs small networks on digits, with several seeds, and reports. {listed}.",
    )
    options.word("study", Choice(tuple(STUDIES)), help="which one")
    options.option(
        "--seeds",
        Whole(1, 100),
        otherwise=f"{SEEDS}, {QUICK_SEEDS} with --quick",
        help="runs of each",
    )
    options.flag("--quick", help="fewer seeds and settings: a few seconds, and noisier")
    options.option(
        "--out", Folder(), otherwise="runs/study-STUDY-TIME", help="the folder for the results"
    )
    return options


def run(arguments: Namespace) -> int:
    """Runs one study, fills the results folder, and prints tables and sentences."""
    name, quick = arguments.study, arguments.quick
    study = _module(name)
    settings = Settings(quick, arguments.seeds or (QUICK_SEEDS if quick else SEEDS))
    folder = arguments.out or default_folder(f"study-{name}")
    with results_folder(folder) as staging:
        with (
            _one_thread(),
            progress(name, study.steps(settings), Console(stderr=True)) as shown,
        ):
            outcome = study.run(settings, shown)
            machine = describe(torch.device("cpu"))
        asked = {"study": name, "seeds": settings.seeds, "quick": quick}
        _write(staging, asked, machine, outcome)
    console = Console()
    for table in outcome.tables:
        console.print(table.on_terminal())
    for sentence in outcome.seen:
        console.print(sentence, highlight=False, markup=False)
    console.print(f"results in {folder}", soft_wrap=True, highlight=False, markup=False)
    return 0


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"fastnorm.cli.studies.{name.replace('-', '_')}")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Networks this small lose more to a second thread than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write(
    folder: Path, asked: dict[str, object], machine: dict[str, str | int], outcome: Outcome
) -> None:
    """Writes `result.json`, the pictures and `report.html`."""
    packages = versions()
    result = {
        "command": "study",
        "arguments": asked,
        "machine": machine,
        "versions": packages,
        "seen": outcome.seen,
        "results": outcome.numbers,
    }
    setting = [(key, str(value)) for key, value in machine.items()]
    setting += [(key, value or "not installed") for key, value in packages.items()]
    parts = [tables.heading("What was seen")]
    parts += [tables.paragraph(sentence) for sentence in outcome.seen]
    parts += [report.picture(title, png) for title, _, png in outcome.pictures]
    parts += [table.in_html() for table in outcome.tables]
    parts.append(report.Table("Machine and versions", ("", ""), setting).in_html())
    lead = ", ".join(f"{key} {value}" for key, value in asked.items())
    title = f"fastnorm study {asked['study']}"
    report.write_json(folder / "result.json", result)
    for _, file, png in outcome.pictures:
        (folder / file).write_bytes(png)
    (folder / "report.html").write_text(report.page(title, lead, parts), "utf-8")
