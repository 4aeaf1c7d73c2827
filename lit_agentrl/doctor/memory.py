"""Peak memory of one pass, and how much there is.

On a GPU it is the allocator's own peak. On a CPU it is the same quantity, counted from every allocation and release
that torch reports to its profiler: bytes of tensors that live at once, above what lived before. The process's resident
memory would not do: its peak never falls, and the allocator keeps what an earlier pass released. What libraries take
behind torch's back (scratch of matrix products, of what ranks send) is in neither.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors on `device` at once during `work`, above those before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _native_messages_hidden(), tempfile.TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            work()
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    return peak_of((event["tid"], *map(event["args"].get, ("Addr", "Bytes"))) for event in found)


def peak_of(changes: Iterable[tuple[int, int, int]]) -> int:
    """Most bytes at once of what the calling thread made.

    Gloo's threads make copies of their own for what they send, and release them where no profiler sees it.

    Args:
        changes: In order of time: the thread, the address, and the bytes there (less than 0: released).
    """
    here, live, peak = threading.get_native_id(), 0, 0
    sizes: dict[int, int] = {}
    others: set[int] = set()
    for thread, address, size in changes:
        if address in sizes:  # released, or made anew: then its release was not seen
            live -= sizes.pop(address)
        elif size < 0 and address not in others:
            live += size  # older than the first change
        others.discard(address)
        if size > 0 and thread == here:
            sizes[address] = size
            live += size
        elif size > 0:
            others.add(address)
        peak = max(peak, live)
    return peak


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken on `device`, a container's limit included; None where nothing says."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        limit = (CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
            used = int((CGROUP / "memory.current").read_text()) - int(stat["file"])  # cached files are given up
            found.append(int(limit) - used)
    except (OSError, ValueError, KeyError):  # another kernel, or no such controller
        pass
    return min(found, default=None)


@contextmanager
def _native_messages_hidden() -> Iterator[None]:
    """The profiler's C++ code warns of every tensor that is older than it is; Python's own messages still come."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
