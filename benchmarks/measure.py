"""What the benchmarks share: taking turns, counting arithmetic, the machine's matrix rate, and what to print beside."""

import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def interleaved(contenders: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each contender; they take turns, so that none has the machine at its best. Warm up before."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            seconds[name].append(timed(run, device)[1])
    return {name: statistics.median(times) for name, times in seconds.items()}


def timed(run: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return result, time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_flops(run: Callable[[], Any]) -> tuple[Any, int]:
    """What `run` gives, and the floating-point operations of its matrix products, convolutions and attention."""

    def attention(query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(query_shape, key_shape, value_shape)

    # PyTorch counts the attention of GPUs alone
    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        result = run()
    return result, counter.get_total_flops()


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of one large matrix product: the roof of what matrix work can reach."""
    side = 8192 if device.type == "cuda" else 2048
    one, two = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    one @ two
    seconds = statistics.median(timed(lambda: one @ two, device)[1] for _ in range(5))
    return 2 * side**3 / seconds


def copy_rate(device: torch.device) -> float:
    """Bytes per second that are read, and as many written, in copying a large tensor: reading alone is no slower."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = statistics.median(timed(lambda: target.copy_(source), device)[1] for _ in range(5))
    return 2 * source.nbytes / seconds


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_mb(device: torch.device) -> float:
    """Of the GPU since `reset_peak`; of the CPU's memory since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
