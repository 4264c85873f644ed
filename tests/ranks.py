"""Processes of a gloo group on this machine, each running the same functions of a test module.

    results = run(2, [module.function, ...], tmp_path)      # results[rank][name]

A process joins the group, calls every function with (rank, processes), and sends back what they
return. Kernels run in the interpreter there as they do here, every launch checked.
"""

import os
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Work = Callable[[int, int], Any]
TIMEOUT = timedelta(seconds=120)  # of a collective; a test of failures has its own


def run(processes: int, work: Sequence[Work], folder: Path) -> list[dict[str, Any]]:
    """What each function returned in each process; raises where one raised."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = (processes, tuple(work), str(folder))
    mp.start_processes(_process, arguments, nprocs=processes, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def _process(rank: int, processes: int, work: tuple[Work, ...], folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes,
        timeout=TIMEOUT,
    )  # fmt: skip
    try:
        found = {function.__name__: _checked(function, rank, processes) for function in work}
        torch.save(found, f"{folder}/{rank}.pt")
    except BaseException:
        traceback.print_exc()  # the other process may be heard first, and only of a lost connection
        raise
    finally:
        dist.destroy_process_group()


def _checked(function: Work, rank: int, processes: int) -> Any:
    if torch.cuda.is_available():
        return function(rank, processes)
    import interpreter
    from checker import checked

    interpreter.mend()
    start = time.perf_counter()
    with checked():
        result = function(rank, processes)
    if rank == 0 and os.environ.get("RANKS_TIMES"):
        print(f"{function.__name__}: {time.perf_counter() - start:.1f} s", flush=True)
    return result


def backends() -> tuple[str, ...]:
    """Those that can serve CPU tensors, gloo's own."""
    return ("eager",) if torch.cuda.is_available() else ("eager", "triton")
