"""`fastnorm verify`: every operation against float64 and torch.nn, on this device and backend."""

import os
import time
from argparse import Namespace
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import torch

import fastnorm
from fastnorm import backend, tables
from fastnorm.cli import report
from fastnorm.cli.arguments import (
    Choice,
    Folder,
    Parser,
    UsageError,
    Whole,
    device_choice,
    resolve_device,
)
from fastnorm.cli.environment import describe, versions
from fastnorm.cli.output import default_folder, results_folder
from fastnorm.cli.progress import console, is_over, progress
from fastnorm.verify.cases import cases
from fastnorm.verify.judge import Finding
from fastnorm.verify.run import Examined, Summary, examined, left_out, summaries

CONTRACT = (
    "The contract: an error of at most twice torch.nn's own in that dtype, or a few roundings; "
    "NaN and infinities where torch.nn has them; the same bits on every call. Errors are the "
    "largest of a tensor, relative to its largest element. Each row shows the result that uses up "
    "most of what is allowed."
)
SHOWN = 20
"""Broken results that the terminal lists."""


def parser() -> Parser:
    """The options of `fastnorm verify`."""
    options = Parser(
        "fastnorm verify",
        "Compares output, every gradient and running statistics of every operation, dtype, "
        "layout, mode and activation, on normal and adversarial inputs, with float64's and with "
        "torch.nn's. "
        "Ends with status 1 where an error is larger than the contract allows.",
    )
    options.option("--device", device_choice(), default="auto", help="where to run")
    options.option("--backend", Choice(backend.BACKENDS), default="auto", help="what to verify")
    options.option(
        "--jobs",
        Whole(1, 64),
        otherwise="1; on a GPU up to 8, since kernels are compiled",
        help="processes that share the cases",
    )
    options.option(
        "--limit",
        Whole(1, 86400),
        otherwise="none",
        help="seconds after which no further case is begun; the report says how many are left out",
    )
    options.flag("--quick", help="each dtype, layout, mode, activation and input, but not crossed")
    options.option(
        "--out", Folder(), otherwise="runs/verify-TIME", help="the folder for the results"
    )
    return options


def run(arguments: Namespace) -> int:
    """Examines the cases, fills the results folder, and prints the table."""
    start = time.monotonic()
    device = resolve_device(arguments.device)
    folder = arguments.out or default_folder("verify")
    jobs = arguments.jobs or _jobs(device)
    with fastnorm.use_backend(arguments.backend):
        serving = _backend(device)
        with results_folder(folder) as staging:
            listed, omitted = left_out(cases(arguments.quick), device)
            found = []
            examining = examined(listed, device, backend=arguments.backend, jobs=jobs)
            with progress("verify", len(listed), console()) as shown, closing(examining):
                for one in examining:
                    found.append(one)
                    shown.advance(f"{one.case.operation} {one.case.words()['dtype']}")
                    if is_over(arguments.limit, start):
                        break
            if left := len(listed) - len(found):
                late = f"{left} cases left out: the limit of {arguments.limit} s was over"
                omitted = "; ".join(filter(None, (omitted, late)))
            asked = {name: value for name, value in vars(arguments).items() if name != "out"}
            machine = {**describe(device), "backend": serving}
            _write(staging, asked, machine, found, omitted)
    _print(found, omitted, f"{serving} backend on {machine['name']}")
    print(f"results in {folder}")
    return int(any(one.wrong for one in found))


def _jobs(device: torch.device) -> int:
    """Half the processor's cores, where there is something to compile."""
    return max(1, min(8, (os.cpu_count() or 1) // 2)) if device.type == "cuda" else 1


def _backend(device: torch.device) -> str:
    """The backend that will be verified."""
    try:
        return fastnorm.backend_for(torch.ones(2, 2, device=device))
    except RuntimeError as error:
        allowed = ", ".join(backend.BACKENDS)
        raise UsageError(f"argument --backend: {error} (allowed: {allowed})") from None


def _print(found: list[Examined], omitted: str, where: str) -> None:
    print(_summary_table(summaries(found), where).as_text())
    wrong = [(one, finding) for one in found for finding in one.wrong]
    for one, finding in wrong[:SHOWN]:
        print(f"BROKEN {' '.join(one.case.words().values())}: {_in_words(finding)}")
    if len(wrong) > SHOWN:
        print(f"and {len(wrong) - SHOWN} more: see report.html")
    if omitted:
        print(omitted)
    print(_verdict(found))


def _verdict(found: list[Examined]) -> str:
    wrong = sum(bool(one.wrong) for one in found)
    results = sum(len(one.findings) for one in found)
    if wrong:
        return f"{wrong} of {len(found)} cases break the contract"
    return f"the contract is kept: {len(found)} cases, {results} results"


def _in_words(finding: Finding) -> str:
    return (
        f"{finding.result}: {finding.wrong} (error {_number(finding.ours)}, "
        f"torch.nn {_number(finding.torchs)}, allowed {_number(finding.allowed)})"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 1000 else f"{value:.0e}"


COLUMNS = ("error", "torch.nn", "ratio", "of allowed", "verdict")


def _cells(finding: Finding, verdict: str) -> tuple[str, ...]:
    return (
        _number(finding.ours),
        _number(finding.torchs),
        _ratio(finding.ratio),
        _ratio(finding.share),
        verdict,
    )


def _summary_table(found: list[Summary], where: str) -> report.Table:
    rows = [
        (
            *(f"{one.operation} {one.dtype}", str(one.cases), _ratio(one.typical_ratio)),
            one.worst.result,
            *_cells(one.worst, f"{one.wrong} broken" if one.wrong else "kept"),
        )
        for one in found
    ]
    columns = ("operation", "cases", "typical ratio", "nearest", *COLUMNS)
    return report.Table(f"Errors against float64: {where}", columns, rows, CONTRACT)


def _case_table(operation: str, found: list[Examined]) -> str:
    """HTML: a row for each case."""
    rows = []
    for one in found:
        words = one.case.words()
        words.pop("operation")
        worst = one.worst
        rows.append((*words.values(), worst.result, *_cells(worst, worst.wrong or "kept")))
    columns = ("dtype", "shape", "layout", "mode", "activation", "values", "nearest", *COLUMNS)
    return tables.folded(f"{operation}: {len(found)} cases", tables.table(columns, rows))


def _write(
    folder: Path,
    asked: Mapping[str, object],
    machine: Mapping[str, object],
    found: list[Examined],
    omitted: str,
) -> None:
    """Writes `result.json` and `report.html`."""
    packages = versions()
    result = {
        "command": "verify",
        "arguments": asked,
        "machine": machine,
        "versions": packages,
        "kept": not any(one.wrong for one in found),
        "left_out": omitted,
        "cases": [_result(one) for one in found],
    }
    parts = [tables.paragraph(_verdict(found))]
    parts += [tables.paragraph(omitted, "note")] if omitted else []
    parts.append(_summary_table(summaries(found), str(machine["backend"])).in_html())
    wrong = [
        (" ".join(one.case.words().values()), _in_words(finding))
        for one in found
        for finding in one.wrong
    ]
    if wrong:
        parts.append(report.Table("What breaks the contract", ("case", "result"), wrong).in_html())
    parts.append(tables.heading("Every case"))
    for operation in dict.fromkeys(one.case.operation for one in found):
        mine = [one for one in found if one.case.operation == operation]
        parts.append(_case_table(operation, mine))
    setting = [(name, str(value)) for name, value in machine.items()]
    setting += [(name, version or "not installed") for name, version in packages.items()]
    parts.append(report.Table("Machine and versions", ("", ""), setting).in_html())
    lead = ", ".join(f"{name} {value}" for name, value in asked.items())
    report.write_json(folder / "result.json", result, indent=None)
    (folder / "report.html").write_text(report.page("fastnorm verify", lead, parts), "utf-8")


def _result(one: Examined) -> dict[str, object]:
    """What `result.json` says of one case."""
    results = {
        finding.result: {
            "error": finding.ours,
            "torch": finding.torchs,
            "ratio": finding.ratio,
            "allowed": finding.allowed,
            "verdict": finding.wrong or "kept",
        }
        for finding in one.findings
    }
    return {**one.case.words(), "results": results}
