"""Put measured results into README.md, bench/results/cpu*.md and the docs; none is typed by hand.

`python bench/render.py` (`make results`) reads what `fastnorm bench` left under bench/results, a
folder a device, the reports of `make traffic`, `codegen` and `emulate`, and linear_batch_norm.json.
README and docs/linear_batch_norm.md have a block between two markers, and tests/test_results.py
holds all files to what this gives.
"""

import json
import re
from pathlib import Path
from typing import Any

import cpu_page
from markdown import paragraph, table

from fastnorm.cli.bench_groups import geometric, groups, others, speedups

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results"
BEGIN, END = "<!-- results: made by `make results` -->", "<!-- results: end -->"
TIMES, TIMES_END = "<!-- times: made by `make results` -->", "<!-- times: end -->"
PACKAGES = ("torch", "triton")
PASSES = {
    "eval": "evaluation", "train": "training, forward", "train+backward": "forward and backward"
}  # fmt: skip


def benchmarks() -> dict[Path, dict[str, Any]]:
    """What `fastnorm bench` left, by its folder: GPUs first."""
    found = {}
    for path in sorted(RESULTS.glob("**/result.json")):
        result = json.loads(path.read_text("utf-8"))
        if result["command"] == "bench":
            found[path.parent] = result
    return dict(sorted(found.items(), key=lambda item: item[1]["machine"]["device"] == "cpu"))


def is_cpu_page(result: dict[str, Any]) -> bool:
    """Whether this run has a page: one of every layer on a CPU."""
    return bool(result["machine"]["device"] == "cpu" and not result["arguments"]["quick"])


def machine(result: dict[str, Any]) -> str:
    """Device, date, threads and versions, in a sentence."""
    versions = ", ".join(
        f"{name} {result['versions'][name]}"
        for name in (*PACKAGES, "python")
        if result["versions"].get(name)
    )
    found = result["machine"]
    count = found["threads"]
    threads = f", {count} thread{'s' * (count != 1)}" if found["device"] == "cpu" else ""
    return f"{found['name']}, {found['system']}{threads}; {result['date']}; {versions}."


def device(folder: Path, result: dict[str, Any]) -> list[str]:
    """A device's table and plots."""
    names = others(result)
    pairs = [(other, kind) for other in names for kind in ("forward", "step")]
    rows = []
    for name, cases in groups(result["results"]).items():
        means = [
            geometric(speedups([c for c in cases if (c["pass"] == "step") == (kind == "step")], n))
            for n, kind in pairs
        ]
        rows.append([name, str(len(cases)), *(f"{m:.2f}" if m == m else "–" for m in means)])
    place = folder.relative_to(ROOT)
    copies = f"{result['ceilings']['memory_bytes_per_s'] / 1e9:.1f} GB/s"
    return [
        f"### {result['machine']['name']}{', quick' * bool(result['arguments']['quick'])}",
        paragraph(f"""{machine(result)} Copies run at {copies} here. Speed of fastnorm over each
            library's: geometric means over shapes, layouts and dtypes; their calls take turns in
            one process, over buffers larger than the cache. Peers absent:
            {", ".join(result["absent"]) or "none"}."""),
        table(["", "cases", *map(", ".join, pairs)], rows),
        f"![Speed-up by operation]({place}/speedup.png)",
        f"![Bandwidth over size]({place}/bandwidth.png)",
    ]


def table_rows(path: Path, section: str = "") -> list[dict[str, str]]:
    """The rows of the first table after the heading `section`, by column."""
    text = path.read_text("utf-8")
    text = text[text.index(f"## {section}\n") :] if section else text
    lines = text[text.index("\n|") :].split("\n\n")[0].strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def traffic() -> list[str]:
    """By family: the largest ratio of bytes moved to the fewest, forward and backward."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in table_rows(RESULTS / "traffic.md"):
        family = found.setdefault(row["case"].split(", ")[0], {"forward": [], "backward": []})
        family[row["direction"]].append(float(row["ratio"]))
    rows = [
        [name, str(len(by["forward"])), *(f"{max(ratios):.3f}" for ratios in by.values())]
        for name, by in found.items()
    ]
    return [
        "### Bytes moved",
        paragraph("""Counted in Triton's interpreter: distinct bytes that all launches of a pass
            load and store, over the fewest that its mathematics needs; the largest ratio of the
            operation's cases. Every case:
            [bench/results/traffic.md](bench/results/traffic.md)."""),
        table(["operation", "cases", "forward", "backward"], rows),
    ]


def codegen() -> list[str]:
    """By target: how many kernels, their registers, spills, and the widths of their accesses."""
    path = RESULTS / "codegen.md"
    rows = []
    for target in re.findall(r"^## (\w+)$", path.read_text("utf-8"), re.MULTILINE):
        found = table_rows(path, target)
        widths = [pair for row in found for pair in re.findall(r"(\d+)×(\d+)", row["widths"])]
        wide = sum(int(count) for size, count in widths if size == "16")
        rows.append([
            target, str(len({row["kernel"] for row in found})), str(len(found)),
            str(max(int(row["registers"]) for row in found)),
            *(str(sum(int(row[what]) > 0 for row in found)) for what in ("spills", "stack")),
            f"{wide / sum(int(count) for _, count in widths):.0%}",
        ])  # fmt: skip
    columns = ["target", "kernels", "specialisations", "most registers", "that spill"]
    return [
        "### Generated code",
        paragraph("""Compiled without a device, for every launch of the benchmark's shapes. Last
            column: the accesses to large tensors that are 16 bytes wide; odd sizes do not allow
            it. Every kernel: [bench/results/codegen.md](bench/results/codegen.md)."""),
        table([*columns, "with a stack", "16 bytes"], rows),
    ]


def emulated() -> list[str]:
    """By operation: cases of compiled kernels, those that break the contract, the nearest to it."""
    found: dict[str, list[dict[str, str]]] = {}
    for row in table_rows(RESULTS / "emulated.md"):
        found.setdefault(row["operation"], []).append(row)
    rows = [
        [name, *(str(sum(int(row[what]) for row in by)) for what in ("cases", "broken")),
         max((row["of allowed"] for row in by), key=float)]
        for name, by in found.items()
    ]  # fmt: skip
    return [
        "### Compiled kernels, emulated",
        paragraph("""What `fastnorm verify --quick` examines on a GPU, of kernels compiled for sm_90
            whose PTX ran on a CPU, approximate instructions being wrong at random, by up to what
            their manual allows. Last column: the share of the error that the contract allows, of
            the worst result. By dtype:
            [bench/results/emulated.md](bench/results/emulated.md)."""),
        table(["operation", "cases", "broken", "of allowed"], rows),
        *emulated_liger(),
    ]


def emulated_liger() -> list[str]:
    """Errors of kernels on the same cases, ours and liger-kernel's."""
    columns = ["operation", "dtype", "cases", "broken", "liger broken", "ratio", "liger ratio"]
    found = table_rows(RESULTS / "emulated-liger.md")
    return [
        paragraph("""The same of liger-kernel's kernels, on the cases that it takes. Ratio: of the
            error to that of torch.nn on a CPU, in the geometric mean. What it breaks:
            [bench/results/emulated-liger.md](bench/results/emulated-liger.md)."""),
        table(columns, [[row[name] for name in columns] for row in found], left=2),
    ]


def block() -> str:
    """README's results."""
    found = benchmarks()
    parts = [BEGIN]
    if all(result["machine"]["device"] == "cpu" for result in found.values()):
        parts.append(
            paragraph("""No GPU figure is stated: none has been measured. Byte counts,
            generated code and times on a CPU stand in for it.""")
        )
    for folder, result in found.items():
        parts += device(folder, result)
        if is_cpu_page(result):
            page = f"{folder.relative_to(ROOT)}.md"
            words = f"torch.nn's own layers, one by one, in [{page}]({page}):"
            parts += [words, cpu_page.verdict(result)]
    return "\n\n".join([*parts, *traffic(), *codegen(), *emulated(), END])


def linear_times() -> str:
    """The speed of `auto` over torch's operators by pass and dtype, over the shapes of a JSON."""
    written = json.loads((RESULTS / "linear_batch_norm.json").read_text("utf-8"))
    results, found_on = written["results"], written["environment"]
    where = "{device}, {threads} threads, torch {torch}, Python {python}:".format(**found_on)
    dtypes = list(dict.fromkeys(result["dtype"] for result in results))
    rows = []
    for kind, words in PASSES.items():
        row = [words]
        for dtype in dtypes:
            found = [r for r in results if (r["pass"], r["dtype"]) == (kind, dtype)]
            ratios = [r["ours, auto"]["ratio"] for r in found]
            row.append(f"{geometric(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        rows.append(row)
    return "\n\n".join([TIMES, where, table(["", *dtypes], rows), TIMES_END])


def replaced(path: Path, begin: str, made: str, end: str) -> str:
    """The text of a file with the block between its markers as it should be."""
    before, rest = path.read_text("utf-8").split(begin)
    return before + made + rest.split(end)[1]


def pages() -> dict[Path, str]:
    """Every file that is made here, as it should be."""
    readme, linear = ROOT / "README.md", ROOT / "docs/linear_batch_norm.md"
    made = {
        readme: replaced(readme, BEGIN, block(), END),
        linear: replaced(linear, TIMES, linear_times(), TIMES_END),
    }
    for folder, result in benchmarks().items():
        if is_cpu_page(result):
            place = folder.relative_to(ROOT)
            made[folder.with_suffix(".md")] = cpu_page.page(result, machine(result), place)
    return made


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, "utf-8")
