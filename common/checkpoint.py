"""Checkpoints: everything that decides how a run goes on, written so that no moment of death leaves a broken file.

`last.pt` is a dict that `torch.load(..., weights_only=True)` reads:
    schema      this layout's version
    iteration   iterations done
    args        the run's settings, plain values
    networks    name -> state dict
    states      name -> state dict of optimiser, scheduler, scaler, report, ...
    rng         one entry a process: python, numpy, torch and CUDA generators
`best.pt` holds schema, iteration, args and networks alone.
"""

import argparse
import json
import os
import random
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from common import InputError
from common.runtime import Runtime, WorkerDied, derive_seed, last_line

SCHEMA = 1


def random_state() -> dict:
    """The state of every global generator, as tensors, numbers and lists."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, spare = random.getstate()
    return {
        "python": [version, list(words), spare],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_random_state(state: dict) -> None:
    """Put back what `random_state` returned."""
    version, words, spare = state["python"]
    random.setstate((version, tuple(words), spare))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def write(content: dict | list[str], path: Path) -> None:
    """Write `content` to `path` through a temporary file: .json, .txt (a line an entry), else by torch.save.

    The old file stays until the new one is safely on the disk.

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
        # torch.save closes its archive on the way out, which may raise a RuntimeError after the OSError.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise  # not the disk: an error of the GPU, met while a tensor was copied
        reason = cause.strerror or "the write failed"
        free = shutil.disk_usage(path.parent).free / 1e6
        raise InputError(
            f"cannot write {path}: {reason}, {free:.0f} MB are free there; the file before it is untouched"
        ) from None


def save(
    path: Path,
    iteration: int,
    args: argparse.Namespace,
    networks: Mapping[str, nn.Module],
    states: Mapping,
    rt: Runtime,
) -> None:
    """Write the whole state after `iteration` iterations; collective across processes, written by the first."""
    rt.settle()
    rng = [random_state()]
    if rt.world > 1:
        rng = [None] * rt.world
        dist.all_gather_object(rng, random_state())
    content = {name: state.state_dict() for name, state in states.items()}  # on all: the report adds its sums up
    if rt.is_main:
        write({**header(iteration, args, networks), "states": content, "rng": rng}, path)
    rt.barrier()


@contextmanager
def saved_first(
    path: Path,
    iteration: int,
    args: argparse.Namespace,
    networks: Mapping[str, nn.Module],
    states: Mapping,
    rt: Runtime,
) -> Iterator[None]:
    """Around the loading of a batch: what ends a run there ends it after a checkpoint.

    A file that cannot be read is found when its turn comes, and a loader worker may be killed at any time; neither should
    cost the iterations since the last checkpoint. With several processes it does: saving takes all of them, and the
    others are waiting inside their training step.

    Args:
        path: the checkpoint to write.
        iteration: iterations done; with none there is nothing to keep.
        args, networks, states, rt: as for `save`.

    Raises:
        InputError: a file could not be read; the message says that the run can go on, and how.
        WorkerDied: a loader worker was killed.
    """
    if hasattr(signal, "SIGCHLD"):
        # PyTorch's handler raises wherever the program is when a worker dies, inside the optimiser's step as well. Without
        # it the loader itself notices, when it is asked for a batch.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    keep = iteration > 0 and rt.world == 1
    try:
        yield
    except InputError as error:
        if not keep:
            raise
        save(path, iteration, args, networks, states, rt)
        run = getattr(args, "run", args.output_dir)
        raise InputError(
            f"{last_line(error)}; saved at iteration {iteration}: repair or remove the file, "
            f"then go on with --resume {run}"
        ) from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        if keep:
            save(path, iteration, args, networks, states, rt)
        raise WorkerDied(str(error).splitlines()[0]) from None


def header(iteration: int, args: argparse.Namespace, networks: Mapping[str, nn.Module]) -> dict:
    """What `best.pt` holds, and the first part of `last.pt`."""
    return {
        "schema": SCHEMA,
        "iteration": iteration,
        "args": dict(vars(args)),
        "networks": {name: network.state_dict() for name, network in networks.items()},
    }


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
        raise InputError(f"{path}: not a checkpoint ({type(error).__name__}); is the file complete?") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise InputError(f"{path}: not a checkpoint of this version (schema {SCHEMA} is expected)")
    return content


def read_description(run: Path, *needed: str) -> dict:
    """The run's `args.json`: its settings under "args", and classes, colours, protocol, versions.

    Args:
        run: the run's folder.
        needed: further entries that must be there; while ST's first stages train, the run has its settings only.

    Raises:
        InputError: no run in that folder, or a damaged file.
    """
    try:
        content = json.loads((run / "args.json").read_text())
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
    """Whether a training has left a checkpoint or a row of metrics in the folder; one that failed at its start has not."""
    metrics = run / "metrics.csv"
    return (run / "last.pt").exists() or (metrics.is_file() and len(metrics.read_text().splitlines()) > 1)


def load_networks(content: dict, networks: Mapping[str, nn.Module], path: Path) -> None:
    """Load `networks` by name.

    Raises:
        InputError: another method's checkpoint, or tensors of another shape; the message names the first.
    """
    for name, network in networks.items():
        if name not in content["networks"]:
            raise InputError(
                f"{path}: holds {', '.join(content['networks'])}, not '{name}': another name, or another method's checkpoint"
            )
        try:
            network.load_state_dict(content["networks"][name])
        except RuntimeError as error:
            raise InputError(f"{path}: does not fit this network: {str(error).splitlines()[1].strip()}") from None


def resume(path: Path | None, args: argparse.Namespace, networks: Mapping[str, nn.Module], states: Mapping, rt: Runtime) -> int:
    """Put the state of `path` back and return the iterations done; for None or no file yet, 0 and fresh generators."""
    torch.manual_seed(derive_seed(args.seed, rt.rank, 0xD0))  # dropout differs between processes, initialisation did not
    if path is None or not path.is_file():
        if args.eval_only:
            raise InputError(f"--eval-only: no checkpoint {path}")
        return 0
    content = read(path)
    load_networks(content, networks, path)
    for name, state in states.items():
        state.load_state_dict(content["states"][name])
    if len(content["rng"]) == rt.world:  # else --eval-only, which draws nothing
        set_random_state(content["rng"][rt.rank])
    return content["iteration"]
