"""One process: its device and seeds, the signals that stop it, and the exit codes it ends with.

Every script is run by `launch(main, args)`, which turns what goes wrong into one line and an
exit code: 2 for bad input; 130 for Ctrl-C and 0 for SIGTERM, both after a checkpoint; 1 for a loss
that is not finite, too little memory, a loader worker that was killed, or a file that could not be
written while logging.
"""

import argparse
import atexit
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import kernels
from common import InputError, distributed, lacks_memory
from common.rendezvous import fresh_store
from kernels.interpolation import use_triton


class Stopped(Exception):
    """SIGTERM or Ctrl-C arrived and the last checkpoint is written; its argument is the signal."""


class NotFinite(Exception):
    """The loss is NaN or infinite."""


class WorkerDied(Exception):
    """A loader worker was killed from outside; the message is PyTorch's."""


def last_line(error: BaseException) -> str:
    """The message of an error; a loader worker's is the end of a traceback in text."""
    return str(error).rsplit("InputError: ", 1)[-1].strip()


def derive_seed(*numbers: int) -> int:
    """A 63-bit seed from several numbers, well mixed.

    The numbers' count is mixed in, since numpy's SeedSequence ignores trailing zeros.
    """
    sequence = np.random.SeedSequence((len(numbers), *numbers))
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


# ----------------------------------------------------------------------------------------- signals

_arrived: list[
    int
] = []  # signals of this process; a script of several trainings asks several times


def catch_signals() -> None:
    """From now on SIGTERM and Ctrl-C wait until the iteration is finished and saved."""

    def note(number: int, frame) -> None:
        if number == signal.SIGINT and signal_arrived() == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        _arrived.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)


def signal_arrived() -> int | None:
    """The last signal that asked this process to stop."""
    return _arrived[-1] if _arrived else None


def signal_anywhere(device: torch.device) -> int | None:
    """The signal that asked any of the processes to stop; collective."""
    return int(distributed.highest(signal_arrived() or 0, device)) or None


def check_signal() -> None:
    """Raise Stopped if a signal arrived; several processes finish together what they are at."""
    if signal_arrived() and not distributed.together():
        raise Stopped(signal_arrived())


def agree_to_stop(device: torch.device) -> None:
    """Raise Stopped on all processes if a signal arrived at any of them; collective."""
    number = signal_anywhere(device)
    if number:
        raise Stopped(number)


def ignore_interrupts(worker: int) -> None:
    """A loader worker leaves Ctrl-C and SIGTERM to the main process, which saves and ends it.

    Both reach workers too: terminals, `timeout`, torchrun and SLURM signal the process group.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


# ------------------------------------------------------------------------------------------- start


def start(args: argparse.Namespace) -> torch.device:
    """Set up this process: device, the other processes, determinism, seeds, kernels, signals.

    Returns:
        The device to train on.

    Raises:
        InputError: a device that is not there, or fewer than two images a process.
    """
    if args.batch_size < 2 and not args.eval_only:
        raise InputError(
            "-b 1: at least 2 images a process; "
            "BatchNorm over ASPP's pooled 1x1 map has no variance with one"
        )
    device = find_device(args)
    check_compiler(args, device)
    torch.backends.cudnn.benchmark = device.type == "cuda" and not args.deterministic
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not distributed.together():
        meet(args, device)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)  # the same on all processes: they build the same networks
    kernels.set_backend(args.kernels)
    if (
        args.amp == "fp16"
    ):  # its scale may be too large at first: it leaves steps out, the schedule counts on
        message = r"Detected call of `lr_scheduler.step\(\)` before"
        warnings.filterwarnings("ignore", message=message)
    catch_signals()
    return device


def find_device(args: argparse.Namespace) -> torch.device:
    """The device that `--device` names; under torchrun, this process's own GPU.

    Raises:
        InputError: it is not there.
    """
    device = torch.device(args.device)
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {args.device}: cpu or cuda; no other has been tried")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"--device {args.device}: no CUDA device is visible; use --device cpu")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        count = torch.cuda.device_count()
        if device.index >= count:
            raise InputError(f"--device {device}: there are {count} CUDA devices")
        torch.cuda.set_device(device)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    return device


def meet(args: argparse.Namespace, device: torch.device) -> None:
    """Join the other processes; where torchrun has started them anew, all of them resume.

    On several machines only the one with the failure has a TORCHELASTIC_RESTART_COUNT above 0.
    """
    begun = (Path(args.output_dir) / "args.json").is_file()  # asked before any process can write it
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=fresh_store(rank, world), rank=rank, world_size=world)
    restarts = distributed.highest(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), device)
    args.resume = args.resume or (begun and restarts > 0)


def check_compiler(args: argparse.Namespace, device: torch.device) -> None:
    """Let Triton, where it is used, compile its first file now, not in the first iteration.

    It compiles a piece of C for the GPU's driver and one for each kernel.

    Raises:
        InputError: it cannot.
    """
    if device.type != "cuda" or not (use_triton(args.kernels, device) or args.compile):
        return
    instead = "or give --kernels torch" + (" and leave --compile out" if args.compile else "")
    compilers = (
        [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    )  # as Triton looks for them
    if not any(map(shutil.which, compilers)):
        missing = " or ".join(compilers)
        raise InputError(
            f"Triton needs a C compiler and there is no {missing}: install gcc or clang, {instead}"
        )
    try:
        import triton

        _ = triton.runtime.driver.active  # made, and so compiled, when it is first asked for
    except Exception as error:  # of the compiler, a missing library or package: it raises all kinds
        compiled = isinstance(error, subprocess.CalledProcessError)  # its text is the whole command
        reason = "the C compiler's error is above" if compiled else str(error).splitlines()[0]
        raise InputError(
            f"Triton does not start ({reason}); "
            f"it needs gcc or clang with Python's headers (python3-dev), {instead}"
        ) from None


# --------------------------------------------------------------------------------------------- end


def end_workers() -> None:
    """Kill the loader workers that an error has left.

    They ignore SIGTERM, with which Python would end them, and then wait for them forever.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise
    for child in multiprocessing.active_children():
        child.kill()


def explain(error: BaseException, run: str) -> tuple[int, str]:
    """Exit code and one line for what `launch` catches; `run` is the run's folder."""
    resume = f"--resume {shlex.quote(run)}"
    go_on = f"go on from the last checkpoint with {resume}"
    match error:
        case Stopped(args=(signal.SIGINT,)):
            return 130, f"stopped: Ctrl-C; go on with {resume}"
        case Stopped():
            return 0, f"stopped: SIGTERM; go on with {resume}"
        case InputError():
            return 2, f"error: {last_line(error)}"
        case WorkerDied():
            advice = "Too little memory, most likely: fewer workers (-j) or a smaller -b"
            return 1, f"stopped: {error} {advice}; {go_on}"
        case NotFinite():
            advice = "The last checkpoint is untouched; try a lower --lr or --amp off"
            return 1, f"stopped: {error}. {advice}"
        case _ if lacks_memory(error):
            on_gpu = isinstance(error, torch.OutOfMemoryError)
            reason = str(error).split(". ")[0] if on_gpu else "too little memory"
            return 1, f"stopped: {reason}; try a smaller -b or --crop-size, or --amp bf16"
        case KeyboardInterrupt():
            return 130, f"stopped at once; {go_on}"
    return 1, f"stopped: {error}; {go_on}"  # an OSError: a full disk while logging, most likely


EXPECTED = (Stopped, InputError, NotFinite, WorkerDied, OSError, KeyboardInterrupt)


def launch(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run `main(args)`; end with one clear line for what may go wrong.

    A traceback is printed with `--debug` only.
    """
    atexit.register(end_workers)
    code = 0
    try:
        main(args)
    except BaseException as error:
        expected = isinstance(error, EXPECTED) or lacks_memory(error)
        if not expected or (args.debug and not isinstance(error, Stopped)):
            raise
        code, message = explain(error, args.output_dir)
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr, flush=True)
    if distributed.together() and code in (0, 130):
        dist.destroy_process_group()
    sys.exit(code)
