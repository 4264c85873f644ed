"""What `fastnorm bench` says: tables, sentences and HTML, all of them made from its JSON."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastnorm import tables as html
from fastnorm.bench import published
from fastnorm.bench.ceilings import Ceilings
from fastnorm.bench.suite import BASELINE, OURS
from fastnorm.cli import bench_plots, report
from fastnorm.cli.bench_groups import Result, geometric, groups, others, speedups
from fastnorm.cli.report import Table


def ceilings_in_json(found: Ceilings) -> dict[str, Any]:
    copy = [{"bytes": size, "bytes_per_s": rate} for size, rate in found.copy.items()]
    return {"copy": copy, "memory_bytes_per_s": found.memory, "flop_per_s": found.products}


def tables(result: Mapping[str, Any]) -> list[Table]:
    """A summary by operation, what others have published of an operation, and every case."""
    return [_summary(result), *_published(result), _all(result)]


def _summary(result: Mapping[str, Any]) -> Table:
    rows = []
    for name, cases in groups(result["results"]).items():
        cells = [str(len(cases))]
        for other in others(result):
            for kind in ("forward", "step"):
                chosen = [case for case in cases if (case["pass"] == "step") == (kind == "step")]
                cells.append(_number(geometric(speedups(chosen, other))))
        worst = min(speedups(cases, BASELINE))
        rows.append((name, *cells, _number(worst)))
    heads = [f"{other}, {kind}" for other in others(result) for kind in ("forward", "step")]
    note = (
        "Speed of fastnorm over each library's: geometric means over shapes, layouts and dtypes. "
        "Forward is that of training and of evaluation, step is forward and backward."
    )
    columns = ("", "cases", *heads, f"least, {BASELINE}")
    return Table("Speed-up by operation", columns, rows, note)


def _published(result: Mapping[str, Any]) -> list[Table]:
    """RMSNorm by row length, where a GPU was measured: a CPU's memory is no match for it."""
    top = result["ceilings"]["memory_bytes_per_s"]
    rows = []
    for case in result["results"]:
        kind = (case["operation"], case["dtype"], case["pass"])
        if kind != ("RMSNorm", "bfloat16", "forward") or case["backend"] != "triton":
            continue
        if not any(case["shape"][-1] in rates for rates in published.RMS_NORM.values()):
            continue
        rate = case["bytes"] / case["costs"][OURS]["best_s"]
        theirs = (rates.get(case["shape"][-1]) for rates in published.RMS_NORM.values())
        cells = ("–" if r is None else f"{r} ({r / published.PEAK:.0%})" for r in theirs)
        rows.append((str(case["shape"][-1]), f"{rate / 1e9:.0f} ({rate / top:.0%})", *cells))
    note = (
        "GB/s by row length, forward, bfloat16. fastnorm's were measured here: in brackets the "
        "share of a copy's speed. The others are an H100's, from quack's published plot: in "
        f"brackets the share of its peak of {published.PEAK} GB/s."
    )
    columns = ("row", OURS, *(f"{name}, published" for name in published.RMS_NORM))
    return [Table("RMSNorm beside published figures", columns, rows, note)] if rows else []


def _all(result: Mapping[str, Any]) -> Table:
    on_gpu = any(case["costs"][OURS]["launches"] is not None for case in result["results"])
    rows = []
    for case in result["results"]:
        ours = case["costs"][OURS]
        shape = "×".join(map(str, case["shape"]))
        name = f"{case['name']}: {case['operation']} {shape} {case['layout']}"
        cells = [case["dtype"], case["pass"], f"{ours['best_s'] * 1e6:,.0f}"]
        cells += [f"{case['bytes'] / ours['best_s'] / 1e9:.0f}", f"{ours['of_ceiling']:.0%}"]
        cells += [_of(case, other, "speedup", _number) for other in others(result)]
        cells.append(_memory(case))
        if on_gpu:
            cells += [_launches(case), _of(case, OURS, "host_s", lambda s: f"{s * 1e6:.0f}")]
        rows.append((name, *cells, f"{case['noise']:.1%}"))
    columns = ["", "dtype", "pass", "µs", "GB/s", "ceiling", *others(result), "memory"]
    columns += ["launches", "host µs"] if on_gpu else []
    note = (
        "µs, GB/s (fewest bytes over the time) and share of the ceiling are fastnorm's; then its "
        "speed over each library's, best times of interleaved rounds; its peak memory over "
        "torch.nn's; noise: how far torch.nn is from itself in the same rounds."
    )
    return Table("Every case", (*columns, "noise"), rows, note)


def _of(case: Result, name: str, what: str, form: Callable[[float], str]) -> str:
    value = case["costs"].get(name, {}).get(what)
    return "–" if value is None else form(value)


def _memory(case: Result) -> str:
    both = [case["costs"][name]["peak_bytes"] for name in (OURS, BASELINE)]
    return f"{both[0] / both[1]:.2f}" if all(both) else "–"


def _launches(case: Result) -> str:
    return " / ".join(_of(case, name, "launches", str) for name in (OURS, BASELINE))


def _number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "–"


def sentences(result: Mapping[str, Any]) -> list[str]:
    """The ceilings, who is absent, and who refused what."""
    top = result["ceilings"]
    products = " and ".join(f"{v / 1e12:.3g} TFLOP/s in {k}" for k, v in top["flop_per_s"].items())
    said = [
        f"Ceilings measured here: copies at {top['memory_bytes_per_s'] / 1e9:.3g} GB/s, bytes read "
        f"plus written; matrix products at {products}."
    ]
    if result["absent"]:
        names = ", ".join(f"{name} ({reason})" for name, reason in result["absent"].items())
        said.append(f"Absent: {names}.")
    reasons: dict[tuple[str, str], int] = {}
    for case in result["results"]:
        for name, reason in case["refused"].items():
            key = (f"{name}, {case['operation']}", reason)
            reasons[key] = reasons.get(key, 0) + 1
    said += [f"Left out: {what}, {n} cases: {why}" for (what, why), n in reasons.items()]
    said += [f"Failed: {case}: {why}" for case, why in result.get("failed", {}).items()]
    if late := result.get("left_out"):
        said.append(f"Left out, since the limit was over: {'; '.join(late)}.")
    return said


def write(folder: Path, result: Mapping[str, Any]) -> None:
    """Writes `result.json`, the pictures and `report.html`."""
    setting = [(name, str(value)) for name, value in result["machine"].items()]
    setting += [(name, value or "not installed") for name, value in result["versions"].items()]
    pictures = bench_plots.pictures(result)
    summary, *more = tables(result)
    parts = [summary.in_html()]
    parts += [html.paragraph(sentence) for sentence in sentences(result)]
    parts += [report.picture(title, png) for title, _, png in pictures]
    parts += [
        *(table.in_html() for table in more),
        Table("Machine and versions", ("", ""), setting).in_html(),
    ]
    lead = f"{result['machine']['name']}, {result['date']}"
    report.write_json(folder / "result.json", result)
    for _, file, png in pictures:
        (folder / file).write_bytes(png)
    (folder / "report.html").write_text(report.page("fastnorm bench", lead, parts), "utf-8")
