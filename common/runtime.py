"""One training process: device, seeds, precision, the other processes, signals.

Checkpoints stand in `checkpoint.py`. Every script starts with `rt = start(args)` and is run by `launch(main, args)`, which
turns what goes wrong into one line and an exit code: 2 for bad input, 130 for Ctrl-C, 0 for SIGTERM (both after a
checkpoint), 1 for a loss that is not finite, too little memory, a loader worker that was killed, or a file that could not
be written while logging.
"""

import argparse
import atexit
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from common import InputError, sync_batch_norm
from common.rendezvous import fresh_store
from kernels.interpolation import use_triton


class Stopped(Exception):
    """SIGTERM or Ctrl-C arrived and the last checkpoint is written."""


class NotFinite(Exception):
    """The loss is NaN or infinite."""


class WorkerDied(Exception):
    """A loader worker was killed from outside; the message is PyTorch's."""


def last_line(error: BaseException) -> str:
    """The message of an error; one of a loader worker arrives as a traceback in text, with the message at its end."""
    return str(error).rsplit("InputError: ", 1)[-1].strip()


def derive_seed(*numbers: int) -> int:
    """A 63-bit seed from several numbers, well mixed (numpy's SeedSequence, which by itself ignores trailing zeros)."""
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)[0] >> 1)


def ignore_interrupts(worker: int) -> None:
    """A loader worker leaves Ctrl-C and SIGTERM to the main process, which finishes its iteration, saves and ends the workers.

    Both reach workers too: a terminal, `timeout`, torchrun and SLURM signal the whole process group.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@dataclass
class Runtime:
    """What a script needs to know of its process.

    Attributes:
        device: where the networks are.
        rank, world: this process among all (0 of 1 without torchrun).
        amp: autocast dtype, or None for float32.
        scaler: loss scaler, active with float16 only.
        compile: whether `wrap` compiles.
        signal: the signal that asked to stop, or None.
        polls: calls of `stopping`.
        pending: the last loss that `check_finite` has not looked at: event, value, iteration, names.
    """

    device: torch.device
    rank: int
    world: int
    amp: torch.dtype | None
    scaler: torch.amp.GradScaler
    compile: bool
    signal: int | None = None
    polls: int = 0
    pending: tuple | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    # ------------------------------------------------------------------------------------------------------- networks

    def place(self, network: nn.Module) -> nn.Module:
        """Move to the device: channels_last on CUDA, BatchNorm over all processes. Before building the optimiser."""
        if self.world > 1:
            network = sync_batch_norm.convert(network)
        if self.device.type == "cuda":
            network = network.to(memory_format=torch.channels_last)
        return network.to(self.device)

    def wrap(self, network: nn.Module) -> nn.Module:
        """The callable to train through: DDP across processes, compiled with `--compile`; the same parameters as `network`."""
        if self.world > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            # Buffers stay local: broadcasting them before each forward would break a second forward before the backward.
            network = nn.parallel.DistributedDataParallel(network, device_ids=devices, broadcast_buffers=False)
        return torch.compile(network) if self.compile else network

    def autocast(self) -> torch.autocast:
        """Mixed precision for the forward pass, as `--amp` says."""
        return torch.autocast(self.device.type, dtype=self.amp or torch.bfloat16, enabled=self.amp is not None)

    def step(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Backward pass and optimiser step, through the loss scaler where float16 needs it."""
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()

    def to_device(self, batch: dict) -> dict:
        """A batch with its tensors on the device; on CUDA the copy runs beside the computation."""
        cuda = self.device.type == "cuda"
        return {
            key: value.to(self.device, non_blocking=cuda) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }

    # ------------------------------------------------------------------------------------------------ other processes

    def mean(self, total: Tensor, count: Tensor) -> Tensor:
        """Mean over the pixels of all processes, as the loss of this one.

        DDP averages gradients over processes, so the local sum is divided by the global count over the number of
        processes: ranks with fewer valid pixels then weigh less, exactly as in one process with the whole batch.
        0 where nothing counts.

        Args:
            total: local sum, a scalar with gradient.
            count: local number of pixels, an integer scalar.
        """
        count = count.detach().to(torch.float32)
        if self.world > 1:
            dist.all_reduce(count)
        return total * self.world / count.clamp_min(1)

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.world > 1:
            dist.barrier()

    def add_up(self, value: Tensor) -> Tensor:
        """Sum of `value` over all processes (a new tensor)."""
        value = value.clone()
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def collect(self, value: Tensor) -> list[Tensor]:
        """`value`, of one shape everywhere, from every process in the order of their ranks; no gradient."""
        if self.world == 1:
            return [value]
        parts = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(self.world)]
        dist.all_gather(parts, value.contiguous())
        return parts

    def gather(self, mine: dict) -> dict:
        """The entries of all processes' dicts."""
        parts = [mine]
        if self.world > 1:
            parts = [None] * self.world
            dist.all_gather_object(parts, mine)
        return {key: value for part in parts for key, value in part.items()}

    # --------------------------------------------------------------------------------------------------------- safety

    def stopping(self) -> bool:
        """Whether to stop now; all processes agree. Across processes they ask each other every 10th call only."""
        if self.world == 1:
            return self.signal is not None
        self.polls += 1
        if self.polls % 10:
            return False
        asked = torch.tensor(float(self.signal or 0), device=self.device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        agreed = int(asked.item())
        self.signal = agreed or self.signal  # one may have arrived meanwhile: for the next time
        return bool(agreed)

    def check_signal(self) -> None:
        """Raise Stopped if a signal arrived; several processes finish together what they are at."""
        if self.signal is not None and self.world == 1:
            raise Stopped(self.signal)

    def agree_to_stop(self) -> None:
        """Raise Stopped on all processes if a signal arrived at any of them."""
        asked = torch.tensor(float(self.signal or 0), device=self.device)
        if self.world > 1:
            dist.all_reduce(asked, dist.ReduceOp.MAX)
        if asked.item():
            raise Stopped(int(asked.item()))

    def check_finite(self, loss: Tensor, iteration: int, names: list[str]) -> None:
        """Stop if the loss is NaN or infinite.

        On CUDA the value is copied without waiting and looked at one iteration later, so that the check costs no
        synchronisation; `names` are kept with it. `settle` looks at what is left, before a checkpoint is written.

        Raises:
            NotFinite: with the iteration and the files of its batch.
        """
        self.settle()
        ready = torch.cuda.Event() if loss.is_cuda else None
        value = loss.detach().to("cpu", non_blocking=loss.is_cuda)
        if ready:
            ready.record()
        self.pending = (ready, value, iteration, names)
        if ready is None:
            self.settle()

    def settle(self) -> None:
        """Look at the last loss that `check_finite` has not looked at yet."""
        if self.pending is None:
            return
        ready, value, iteration, names = self.pending
        self.pending = None
        if ready:
            ready.synchronize()
        if not torch.isfinite(value):
            raise NotFinite(f"the loss is {value.item()} at iteration {iteration}; its pictures: {', '.join(names)}")


_arrived: list[int] = []  # signals of this process: a script of several trainings starts several runtimes


def unwrap(network: nn.Module) -> nn.Module:
    """The network inside what `Runtime.wrap` made of it."""
    network = getattr(network, "_orig_mod", network)
    return getattr(network, "module", network)


def start(args: argparse.Namespace) -> Runtime:
    """Set up this process: device, the other processes (torchrun's environment), seeds, determinism, signals.

    Raises:
        InputError: a device that is not there, or fewer than two pictures a process.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if args.batch_size < 2 and not args.eval_only:
        raise InputError("-b 1: at least 2 pictures a process; BatchNorm over ASPP's pooled 1x1 map has no variance with one")
    device = torch.device(args.device)
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {args.device}: cpu or cuda; no other has been tried")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"--device {args.device}: no CUDA device is visible; use --device cpu")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        if device.index >= torch.cuda.device_count():
            raise InputError(f"--device {device}: there are {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = not args.deterministic
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    check_compiler(args, device)
    if world > 1 and not dist.is_initialized():
        meet(args, device, rank, world)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)  # the same on all processes: they build the same networks

    amp = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    if scaler.is_enabled():  # its scale may be too large at first: it leaves steps out, but the schedule counts iterations
        warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler.step\(\)` before")
    rt = Runtime(device, rank, world, amp, scaler, args.compile, signal=_arrived[-1] if _arrived else None)

    def note(number: int, frame) -> None:
        if rt.signal == signal.SIGINT == number:  # a second Ctrl-C does not wait for the iteration to end
            raise KeyboardInterrupt
        rt.signal = number
        _arrived.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return rt


def meet(args: argparse.Namespace, device: torch.device, rank: int, world: int) -> None:
    """Join the other processes; where torchrun has started them anew, all of them resume.

    On several machines only the one with the failure has a TORCHELASTIC_RESTART_COUNT above 0.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=fresh_store(rank, world), rank=rank, world_size=world)
    begun = (Path(args.output_dir) / "args.json").is_file()  # asked before any process can write it
    restarts = torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), device=device)
    dist.all_reduce(restarts, dist.ReduceOp.MAX)
    args.resume = args.resume or (begun and restarts.item() > 0)


def check_compiler(args: argparse.Namespace, device: torch.device) -> None:
    """Let Triton, where it is going to be used, compile its first file now rather than in the first iteration.

    It compiles a piece of C for the GPU's driver and one for each kernel.

    Raises:
        InputError: it cannot.
    """
    if device.type != "cuda" or not (use_triton(args.kernels, device) or args.compile):
        return
    instead = "or give --kernels torch" + (" and leave --compile out" if args.compile else "")
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]  # as triton/runtime/build.py does
    if not any(map(shutil.which, compilers)):
        raise InputError(f"Triton needs a C compiler and there is no {' or '.join(compilers)}: install gcc or clang, {instead}")
    try:
        import triton

        _ = triton.runtime.driver.active  # made, and so compiled, when it is first asked for
    except Exception as error:  # of the compiler, a missing library or package: it raises all kinds
        compiled = isinstance(error, subprocess.CalledProcessError)  # its text is the whole command
        reason = "the C compiler's error is above" if compiled else str(error).splitlines()[0]
        raise InputError(
            f"Triton does not start ({reason}); it needs gcc or clang with Python's headers (python3-dev), {instead}"
        ) from None


def end_workers() -> None:
    """Kill the loader workers that an error has left: they ignore SIGTERM, after which Python would wait for them forever."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise
    for child in multiprocessing.active_children():
        child.kill()


def explain(error: BaseException, run: str) -> tuple[int, str]:
    """Exit code and one line for what `launch` catches; `run` is the run's folder."""
    go_on = f"go on from the last checkpoint with --resume {run}"
    match error:
        case Stopped(args=(signal.SIGINT,)):
            return 130, f"stopped: Ctrl-C; go on with --resume {run}"
        case Stopped():
            return 0, f"stopped: SIGTERM; go on with --resume {run}"
        case InputError():
            return 2, f"error: {last_line(error)}"
        case WorkerDied():
            return 1, f"stopped: {error} Too little memory, most likely: fewer workers (-j) or a smaller -b; {go_on}"
        case NotFinite():
            return 1, f"stopped: {error}. The last checkpoint is untouched; try a lower --lr or --amp off"
        case torch.OutOfMemoryError():
            return 1, f"stopped: {str(error).split('. ')[0]}; try a smaller -b or --crop-size, or --amp bf16"
        case KeyboardInterrupt():
            return 130, f"stopped at once; {go_on}"
    return 1, f"stopped: {error}; {go_on}"  # an OSError: a full disk while logging, most likely


def launch(main: Callable[[argparse.Namespace], Runtime | None], args: argparse.Namespace) -> None:
    """Run `main(args)` and exit with one clear line for what is expected to go wrong; a traceback only with `--debug`."""
    atexit.register(end_workers)
    code = 0
    try:
        main(args)
    except (
        Stopped, InputError, NotFinite, WorkerDied, torch.OutOfMemoryError, OSError, KeyboardInterrupt,
    ) as error:  # fmt: skip
        if args.debug and not isinstance(error, Stopped):
            raise
        code, message = explain(error, args.output_dir)
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr, flush=True)
    if dist.is_initialized() and code in (0, 130):
        dist.destroy_process_group()
    sys.exit(code)
