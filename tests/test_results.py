"""README's results and bench/results/cpu*.md are what `make results` gives of what is committed."""

import copy
import json
from pathlib import Path

import cpu_page
import pytest
import render

ROOT = Path(__file__).parents[1]


def line(operation="LayerNorm", theirs=10.0, ours=10.0, noise=0.01, share=0.3, **more):
    """A case of a benchmark's JSON; times in microseconds."""
    costs = {
        "torch.nn": {"best_s": theirs * 1e-6, "of_ceiling": share},
        "fastnorm": {"best_s": ours * 1e-6, "of_ceiling": share * theirs / ours},
    }
    costs["torch.nn"] |= {"speedup": theirs / ours, "median_speedup": theirs / ours}
    case = {"name": "hidden size", "operation": operation, "shape": [8, 64], "dtype": "float32"}
    case |= {"layout": "contiguous", "pass": "step", "noise": noise, "costs": costs}
    return case | more


def test_files_are_what_the_command_gives():
    pages = render.pages()
    assert ROOT / "README.md" in pages
    for path, text in pages.items():
        assert path.read_text("utf-8") == text, f"{path.relative_to(ROOT)}: run `make results`"


def test_readme_says_where_no_gpu_was_measured(monkeypatch):
    measured = render.benchmarks()
    assert measured, "no benchmark is committed"
    cpu = next(found for found in measured.values() if found["machine"]["device"] == "cpu")
    monkeypatch.setattr(render, "benchmarks", lambda: {ROOT / "bench/results/cpu": cpu})
    assert "No GPU figure is stated" in render.block()
    gpu = copy.deepcopy(cpu)
    gpu["machine"] |= {"device": "cuda", "name": "a GPU"}
    both = {ROOT / "bench/results/gpu": gpu, ROOT / "bench/results/cpu": cpu}
    monkeypatch.setattr(render, "benchmarks", lambda: both)
    shown = render.block()
    assert "No GPU figure is stated" not in shown
    assert "### a GPU" in shown
    assert "bench/results/gpu/speedup.png" in shown


def test_gpus_come_first(tmp_path, monkeypatch):
    for name, device in (("a", "cpu"), ("b/bench", "cuda:0")):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        text = json.dumps({"command": "bench", "machine": {"device": device}})
        (folder / "result.json").write_text(text)
    (tmp_path / "c").mkdir()
    (tmp_path / "c/result.json").write_text('{"command": "verify"}')
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in render.benchmarks()] == [
        "b/bench",
        "a",
    ]


def test_summary_has_the_numbers_of_its_sources():
    counted = render.table_rows(render.RESULTS / "traffic.md")
    worst = max(float(row["ratio"]) for row in counted if row["case"].startswith("group_norm"))
    assert f"{worst:.3f}" in next(t for t in render.traffic()[2].splitlines() if "group_norm" in t)
    compiled = render.table_rows(render.RESULTS / "codegen.md", "sm_90")
    most = max(int(row["registers"]) for row in compiled)
    row = next(t for t in render.codegen()[2].splitlines() if "sm_90" in t)
    assert f"| {len(compiled)} | {most} |" in row
    kept = render.table_rows(render.RESULTS / "emulated.md")
    cases = sum(int(row["cases"]) for row in kept if row["operation"] == "rms_norm")
    row = next(t for t in render.emulated()[2].splitlines() if "rms_norm" in t)
    assert f"| rms_norm | {cases} | 0 |" in row


# The verdicts of cpu.md.


def test_slower_is_judged_beyond_noise():
    quiet = [line() for _ in range(20)]
    assert cpu_page.slower(quiet) == []
    for ours, noise, found in ((110, 0.01, True), (102, 0.01, False), (110, 0.1, False)):
        case = line(theirs=100, ours=ours, noise=noise)
        assert cpu_page.slower([*quiet, case]) == ([case] if found else [])
    loud = [line(noise=0.2) for _ in range(20)]
    assert cpu_page.slower([*loud, line(theirs=100, ours=110)]) == []


def test_best_times_judge():
    case = line(theirs=100, ours=120)
    case["costs"]["torch.nn"]["median_speedup"] = 1.0
    assert cpu_page.slower([*(line() for _ in range(20)), case]) == [case]


def test_what_only_loud_noise_excuses_is_named():
    cases = [*(line() for _ in range(20)), line(theirs=100, ours=125, noise=0.3)]
    told = " ".join(cpu_page.verdict({"results": cases}).split())
    assert "beyond noise: 0 of 1 cases; undecided, for noise above 5%: 1 (LayerNorm 8×64" in told
    assert "float32 step 0.80)" in told


@pytest.mark.parametrize(
    ("theirs", "ours", "found"), [(19, 23, False), (19, 26, True), (21, 25, True)]
)
def test_short_calls_may_take_longer(theirs, ours, found):
    case = line(theirs=theirs, ours=ours)
    assert cpu_page.slower([*(line() for _ in range(20)), case]) == ([case] if found else [])


def test_verdict():
    cases = [
        *(line("BatchNorm2d", theirs=400, ours=100, shape=[k]) for k in range(20)),
        line("LayerNorm", theirs=100, ours=100, share=0.8),
        line("RMSNorm", theirs=100, ours=100, share=0.2),
        line("GroupNorm", theirs=100, ours=120, share=0.8),
        line("GroupNorm", theirs=10, ours=20, name="small call"),
        line("LayerNorm", theirs=10, ours=12.5, name="small call"),
        line("GroupNorm + silu", theirs=10, ours=1000),
    ]
    told = " ".join(cpu_page.verdict({"results": cases}).split())
    assert "beyond noise: 1 of 23 cases (GroupNorm 8×64 contiguous float32 step 0.83)" in told
    assert "1 of 2 cases (GroupNorm 8×64 contiguous float32 step 0.50). All of them: 1.58" in told
    # BatchNorm2d's shapes are one operator, 4; RMSNorm is another, 1; two are at memory speed
    assert "2 of 4 operators, ours is 2.00 times as fast" in told
