"""`fastnorm bench`: time every operation on this machine, against torch.nn and the peers."""

import time
import warnings
from argparse import Namespace
from dataclasses import dataclass
from datetime import datetime, timezone

import torch
from rich.console import Console

import fastnorm
from fastnorm import tables
from fastnorm.bench import ceilings, suite
from fastnorm.bench.libraries import PEERS
from fastnorm.cli import bench_report
from fastnorm.cli.arguments import (
    Folder,
    Parser,
    Several,
    Text,
    UsageError,
    Whole,
    device_choice,
    resolve_device,
)
from fastnorm.cli.environment import describe, versions
from fastnorm.cli.measure import peak_memory
from fastnorm.cli.output import default_folder, results_folder
from fastnorm.cli.progress import is_over, progress

ROUNDS, QUICK_ROUNDS = 15, 5


def parser() -> Parser:
    """The options of `fastnorm bench`."""
    options = Parser(
        "fastnorm bench",
        "Measures what this machine's memory and matrix products can do, then times layers of real "
        "models in fastnorm, torch.nn, torch.compile and other libraries, in turns in one process.",
    )
    options.flag("--quick", help="fewer layers, one dtype, fewer rounds: under two minutes")
    options.option(
        "--peers",
        Several(tuple(PEERS)),
        otherwise="all that are installed",
        help="what else to compare with, beside torch.nn",
    )
    options.option(
        "--only",
        Text("part of a layer's description, as the report shows it"),
        otherwise="all layers",
        help="the layers to time",
    )
    options.option(
        "--rounds",
        Whole(1, 10000),
        otherwise=f"{ROUNDS}, {QUICK_ROUNDS} with --quick",
        help="samples of each call",
    )
    options.option(
        "--limit",
        Whole(1, 86400),
        otherwise="none",
        help="seconds after which no further case is begun; the report names those left out",
    )
    options.option("--device", device_choice(), default="auto", help="where to run")
    options.option("--out", Folder(), otherwise="runs/bench-TIME", help="the folder for results")
    return options


def run(arguments: Namespace) -> int:
    """Times every case, fills the results folder, and prints the tables."""
    device = resolve_device(arguments.device)
    peers, absent = _peers(arguments.peers, device)
    cases = suite.cases(device, arguments.quick, arguments.only or "")
    if not cases:
        allowed = "part of a layer's description, as the report shows it"
        raise UsageError(
            f"argument --only: no layer is described by {arguments.only!r} (allowed: {allowed})"
        )
    _check_backend(device)
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    folder = arguments.out or default_folder("bench")
    with results_folder(folder) as staging:
        found = _measure(cases, peers, device, rounds, arguments)
        packages = versions() | {PEERS[name].distribution: PEERS[name].version() for name in peers}
        report = {
            "command": "bench",
            "arguments": {"quick": arguments.quick, "only": arguments.only, "rounds": rounds},
            "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
            "machine": {**describe(device), "cache_bytes": ceilings.cache_bytes(device)},
            "versions": packages,
            "peers": peers,
            "absent": absent,
            "ceilings": bench_report.ceilings_in_json(found.top),
            "results": [suite.as_json(one) for one in found.measured],
            "failed": found.failed,
            "left_out": [str(case) for case in found.left_out],
        }
        bench_report.write(staging, report)
    for table in bench_report.tables(report):  # as wide as it is: cut columns would say nothing
        print(table.title, tables.text(table.columns, table.rows), table.note, sep="\n", end="\n\n")
    print(*bench_report.sentences(report), f"results in {folder}", sep="\n")
    return int(bool(found.failed))


@dataclass(frozen=True)
class _Found:
    """What the machine can do, what every case took, and the cases without a result."""

    top: ceilings.Ceilings
    measured: list[suite.Measured]
    failed: dict[str, str]
    left_out: list[suite.Case]


def _measure(
    cases: list[suite.Case],
    peers: list[str],
    device: torch.device,
    rounds: int,
    arguments: Namespace,
) -> _Found:
    """Every case, until the limit; what libraries warn of is not shown.

    One that fails is named at the end, and ends the others only where none has a result.
    """
    start = time.monotonic()
    quick = arguments.quick
    measured: list[suite.Measured] = []
    failed: dict[str, str] = {}
    left = list(cases)
    with (
        warnings.catch_warnings(),
        progress("bench", len(cases), Console(stderr=True)) as shown,
    ):
        warnings.simplefilter("ignore")
        top = ceilings.measure(device, quick)
        while left and not (len(left) < len(cases) and is_over(arguments.limit, start)):
            case = left.pop(0)
            note = "failed"
            try:
                one = suite.measure(
                    case, peers, device, top,
                    rounds=rounds, again=not quick, peak_memory=peak_memory,
                )  # fmt: skip
                measured.append(one)
                note = f"{one.costs[suite.BASELINE].speedup:.2f} of torch.nn's speed"
            except KeyboardInterrupt:  # as of whoever set the limit, and has lost patience
                if arguments.limit is None or not measured:
                    raise
                left.insert(0, case)
                break
            except Exception as problem:  # of whichever library, compiler or driver
                if not measured and (not left or is_over(arguments.limit, start)):
                    raise
                failed[str(case)] = (
                    f"{type(problem).__name__}: {str(problem).partition(chr(10))[0]}"
                )
            shown.advance(f"{case}: {note}")
    return _Found(top, measured, failed, left)


def _peers(asked: tuple[str, ...] | None, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """(the peers that take part, why each of the others does not)."""
    reasons = {name: peer.absence(device) for name, peer in PEERS.items()}
    absent = {name: reason for name, reason in reasons.items() if reason is not None}
    for name in asked or ():
        if name in absent:
            present = ", ".join(("none", *(other for other in PEERS if other not in absent)))
            raise UsageError(f"argument --peers: {name}: {absent[name]} (allowed: {present})")
    chosen = PEERS if asked is None else asked
    return [name for name in chosen if name not in absent], absent


def _check_backend(device: torch.device) -> None:
    try:
        backend = fastnorm.backend_for(torch.ones(2, 2, device=device))
    except RuntimeError as error:  # FASTNORM_BACKEND asks for what this device cannot do
        raise UsageError(f"variable FASTNORM_BACKEND: {error}") from None
    if backend == "triton" and device.type == "cpu":
        raise UsageError("variable FASTNORM_BACKEND: times in Triton's interpreter say nothing")
