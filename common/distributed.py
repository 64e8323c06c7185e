"""What the processes of one run tell each other.

In a run of one process each function does the obvious thing. Every mean over pixels is a mean over
the pixels of all processes (`global_mean`), so that a batch that is spread over several GPUs gives
the loss of the same batch on one.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def together() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if together() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if together() else 0


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank() == 0


def barrier() -> None:
    """Wait for the other processes."""
    if together():
        dist.barrier()


def add_up(value: Tensor) -> Tensor:
    """Sum of `value`, of any shape, over all processes.

    Returns:
        A new tensor. Gradients reach this process's value alone.
    """
    value = value.clone()
    if together():
        dist.all_reduce(value)
    return value


def highest(value: float, device: torch.device) -> float:
    """The highest `value` of all processes."""
    if not together():
        return value
    found = torch.tensor(float(value), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def global_mean(total: Tensor, count: Tensor, least: float = 1.0) -> Tensor:
    """Mean over the pixels of all processes, as the loss of this one; 0 where nothing counts.

    With R processes, of which this one is r:

        loss_r = R · Σ_pixels of r / (number of pixels of all)

    DDP averages gradients over processes, which takes R out again. A process with fewer valid
    pixels then weighs less, exactly as in one process with the whole batch.

    Args:
        total: local sum, a scalar with gradient.
        count: local number of pixels, a scalar; or the sum of their weights.
        least: what the count is taken to be at least, so that nothing is divided by 0.
    """
    counted = add_up(count.detach().to(torch.float32))
    return total * world_size() / counted.clamp_min(least)


def collect(value: Tensor) -> list[Tensor]:
    """`value`, of one shape everywhere, from every process in the order of their ranks.

    Gradients do not pass.
    """
    if not together():
        return [value]
    value = value.contiguous()
    parts = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(parts, value)
    return parts


def gather(mine: object) -> list:
    """A picklable object of every process, in the order of their ranks."""
    if not together():
        return [mine]
    parts = [None] * world_size()
    dist.all_gather_object(parts, mine)
    return parts


def merge(mine: dict) -> dict:
    """The entries of all processes' dicts."""
    return {key: value for part in gather(mine) for key, value in part.items()}
