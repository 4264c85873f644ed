"""Time and memory, the same way on a CPU and on a GPU."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch


def synchronize(device: torch.device) -> None:
    """Waits for what was launched on a GPU; before and after a span that is timed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(work: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes that torch's allocator holds during `work()`, beyond what it held before.

    None on a CPU where this torch was built without the profiler that counts there.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    # Without this the profiler greets on stderr; it asks for its log level when it is first used.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda change: change["ts"]):
        held += change["args"]["Bytes"]
        peak = max(peak, held)
    return peak if changes else None
