"""How `benchmark.py` times a function on a GPU or a CPU, and what it says of the machine."""

import gc
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Machine(NamedTuple):
    """What the rows say of the device; bandwidth in bytes a second, exponentials a second."""

    gpu: str
    driver: str
    bandwidth: float
    exponentials: float


def gpu_machine() -> Machine:
    """Measure a copy, and ask nvidia-smi for clock and driver."""
    import triton

    query = [
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.max.sm",
        "--format=csv,noheader,nounits",
    ]
    try:
        driver, clock = (
            subprocess.run(query, capture_output=True, text=True, check=True)
            .stdout.splitlines()[0]
            .split(", ")
        )
        clock = float(clock)
    except (OSError, ValueError, subprocess.CalledProcessError):
        driver, clock = "unknown", float("nan")
    source = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median") / 1e3
    properties = torch.cuda.get_device_properties(0)
    exponentials = properties.multi_processor_count * 16 * clock * 1e6
    return Machine(properties.name, driver, 2 * source.numel() / seconds, exponentials)


class Timing(NamedTuple):
    """Seconds and bytes.

    Attributes:
        median, low, high: median, 20th and 80th percentile of a call.
        graph: from a CUDA graph.
        host: the host's to ask for a call.
        peak: bytes of memory at the peak.
    """

    median: float
    low: float
    high: float
    graph: float | None = None
    host: float | None = None
    peak: int | None = None


def time_gpu(function: Callable, capture: bool, milliseconds: int = 100) -> Timing:
    """By Triton's own benchmark, which clears the L2 cache between calls, for about `milliseconds`.

    With `capture` also as a CUDA graph, which does not clear it. Only what can be captured may
    ask for that: a failed capture leaves the random generator unusable.
    """
    import triton

    peak = peak_gpu(function)
    median, low, high = (
        ms / 1e3
        for ms in triton.testing.do_bench(function, rep=milliseconds, quantiles=[0.5, 0.2, 0.8])
    )
    graph = None
    if capture:
        graph = triton.testing.do_bench_cudagraph(function, return_mode="median") / 1e3
    return Timing(median, low, high, graph, host_seconds(function) if capture else None, peak)


def host_seconds(function: Callable, calls: int = 20) -> float:
    """The host's time to ask for a call, of a few in a row: it does not wait for the GPU."""
    function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds / calls


def peak_gpu(function: Callable) -> int:
    """Bytes on the GPU that a call has allocated at its peak, beyond what was there before.

    A call to warm up comes first. It may leave garbage behind, a graph of autograd for instance,
    that waits to be collected. Freed during the second call, it would hide as many bytes of that
    one's.
    """
    function()
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def time_cpu(function: Callable, repeats: int = 9) -> Timing:
    """Repeated calls after one to warm up."""
    function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    low, *_, high = statistics.quantiles(seconds, n=5)
    return Timing(statistics.median(seconds), low, high)


def peak_cpu(call: Callable) -> int:
    """Bytes of PyTorch's memory on the host that a call has allocated at its peak.

    What was there before does not count.
    """
    options = {
        "activities": [torch.profiler.ProfilerActivity.CPU],
        "profile_memory": True,
        "acc_events": True,
    }
    with torch.profiler.profile(**options) as profile:
        call()
    live = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def triton_version() -> str:
    """Or a dash where it is not installed."""
    try:
        import triton
    except ImportError:
        return "-"
    return triton.__version__
