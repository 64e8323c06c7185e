"""Checkpoints: everything that decides how a run goes on.

They are written so that a run that dies at any moment leaves no broken file.

`last.pt` is a dict that `torch.load(..., weights_only=True)` reads:
    schema      this layout's version
    iteration   iterations done
    args        the run's settings, plain values
    networks    name -> state dict
    result      the name of the network that is the method's result
    states      name -> state dict of optimiser, schedule, scaler, report, memory bank, ...
    rng         one entry a process: torch's generator and the GPU's
`best.pt` holds all but the last two.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from common import InputError, distributed
from common.runtime import WorkerDied, derive_seed, last_line

SCHEMA = 2


def random_state() -> dict:
    """The state of the generators that a run draws from: torch's, and the GPU's."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict) -> None:
    """Put back what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def write(content: dict | list[str], path: Path) -> None:
    """Write a file through a temporary one; the old file stays until the new one is on the disk.

    Args:
        content: plain values, lines, or what torch.save takes.
        path: its suffix decides the form: .json, .txt with a line an entry, or else torch.save's.

    Raises:
        InputError: the disk is full or the folder cannot be written to; the old file is untouched.
    """
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            if path.suffix == ".json":
                file.write((json.dumps(content, indent=1) + "\n").encode())
            elif path.suffix == ".txt":
                file.write("".join(f"{line}\n" for line in content).encode())
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        # torch.save closes its archive on the way out, which may raise a RuntimeError after the
        # OSError.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise  # not the disk: an error of the GPU, met while a tensor was copied
        reason = cause.strerror or "the write failed"
        free = shutil.disk_usage(path.parent).free / 1e6
        raise InputError(
            f"cannot write {path}: {reason}, {free:.0f} MB are free there; "
            "the file before it is untouched"
        ) from None


def header(
    iteration: int, args: argparse.Namespace, networks: Mapping[str, nn.Module], result: str
) -> dict:
    """What `best.pt` holds, and the first part of `last.pt`.

    Args:
        iteration: iterations done.
        args: the settings, plain values.
        networks: all networks by name.
        result: the name of the one that is the method's result.
    """
    return {
        "schema": SCHEMA,
        "iteration": iteration,
        "args": dict(vars(args)),
        "networks": {name: network.state_dict() for name, network in networks.items()},
        "result": result,
    }


def save(path: Path, content: dict, states: Mapping) -> None:
    """Write the whole state of a run; collective across processes, written by the first.

    Args:
        path: of last.pt.
        content: the `header`.
        states: name -> optimiser, schedule, scaler, report, ...: what has a `state_dict`.
    """
    rng = distributed.gather(random_state())
    # On all processes: the report's adds up over them.
    kept = {name: state.state_dict() for name, state in states.items()}
    if distributed.is_main():
        write({**content, "states": kept, "rng": rng}, path)
    distributed.barrier()


@contextmanager
def saved_first(save: Callable[[], None], done: int, args: argparse.Namespace) -> Iterator[None]:
    """Around the loading of a batch: what ends a run there ends it after a checkpoint.

    A file that cannot be read is found when its turn comes, and a loader worker may be killed at
    any time; neither should cost the iterations since the last checkpoint. With several processes
    it does: saving takes all of them, and the others are waiting inside their training step.

    Args:
        save: writes the checkpoint.
        done: iterations done; with none there is nothing to keep.
        args: `output_dir`, and `run` where that is the folder of a stage.

    Raises:
        InputError: a file could not be read; the message says that the run can go on, and how.
        WorkerDied: a loader worker was killed.
    """
    if hasattr(signal, "SIGCHLD"):
        # PyTorch's handler raises wherever the program is when a worker dies, inside the
        # optimiser's step as well. Without it the loader itself notices, when it is asked for a
        # batch.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    keep = done > 0 and not distributed.together()
    try:
        yield
    except InputError as error:
        if not keep:
            raise
        save()
        run = getattr(args, "run", args.output_dir)
        raise InputError(
            f"{last_line(error)}; saved at iteration {done}: repair or remove the file, "
            f"then go on with --resume {shlex.quote(str(run))}"
        ) from None
    except (RuntimeError, ConnectionError, EOFError) as error:
        message = str(error)
        if not isinstance(error, RuntimeError):
            # The connection to a worker may break before the loader knows that the worker is dead.
            message = f"DataLoader worker is gone ({message})."
        if "DataLoader worker" not in message:
            raise
        if keep:
            save()
        raise WorkerDied(message.splitlines()[0]) from None


def read(path: Path) -> dict:
    """A checkpoint file.

    Raises:
        InputError: missing, broken, or not one of ours.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"no checkpoint at {path}") from None
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        raise InputError(
            f"{path}: not a checkpoint ({type(error).__name__}); is the file complete?"
        ) from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise InputError(f"{path}: not a checkpoint of this version (schema {SCHEMA} is expected)")
    return content


def read_description(run: Path, *needed: str) -> dict:
    """The run's `args.json`: its settings under "args", and classes, colours, protocol, versions.

    Args:
        run: the run's folder.
        needed: further entries that must be there; while ST's first stages train, the run has its
            settings only.

    Raises:
        InputError: no run in that folder, or a damaged file.
    """
    try:
        content = json.loads((run / "args.json").read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"no run in {run} (no args.json there)") from None
    except ValueError:
        raise InputError(f"{run}/args.json is damaged: it is not JSON") from None
    settings = content.get("args") if isinstance(content, dict) else None
    if not isinstance(settings, dict) or not isinstance(settings.get("method"), str):
        raise InputError(f"{run}/args.json is damaged: it holds no settings")
    missing = [name for name in needed if name not in content]
    if missing:
        raise InputError(f"{run}/args.json is damaged: it has no {missing[0]}")
    return content


def occupied(run: Path) -> bool:
    """Whether a training has left a checkpoint or a row of metrics in the folder.

    One that failed at its start has not.
    """
    if (run / "last.pt").exists():
        return True
    metrics = run / "metrics.csv"
    return metrics.is_file() and len(metrics.read_text(encoding="utf-8").splitlines()) > 1


def load_networks(content: dict, networks: Mapping[str, nn.Module], path: Path) -> None:
    """Load `networks` by name.

    Raises:
        InputError: another method's checkpoint, or tensors of another shape; the message names the
            first.
    """
    for name, network in networks.items():
        if name not in content["networks"]:
            found = ", ".join(content["networks"])
            raise InputError(
                f"{path}: holds {found}, not '{name}': another name, or another method's checkpoint"
            )
        try:
            network.load_state_dict(content["networks"][name])
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise InputError(f"{path}: does not fit this network: {reason}") from None


def resume(
    path: Path, args: argparse.Namespace, networks: Mapping[str, nn.Module], states: Mapping
) -> int:
    """Put the state of last.pt back and return the iterations done.

    Without `--resume`, or where a run died before its first checkpoint, that is 0, and the
    generators start afresh.

    Raises:
        InputError: `--eval-only` without a checkpoint, or one that does not fit.
    """
    # Dropout differs between processes; the initialisation, drawn before, did not.
    torch.manual_seed(derive_seed(args.seed, distributed.rank(), 0xD0))
    if not args.resume or not path.is_file():
        if args.eval_only:
            raise InputError(f"--eval-only: no checkpoint {path}")
        return 0
    content = read(path)
    load_networks(content, networks, path)
    for name, state in states.items():
        state.load_state_dict(content["states"][name])
    if len(content["rng"]) == distributed.world_size():  # else --eval-only, which draws nothing
        set_random_state(content["rng"][distributed.rank()])
    return content["iteration"]
