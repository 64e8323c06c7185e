"""Steps and losses of a run, and two processes against one."""

import math
import warnings

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import cps
from common import runtime
from common.deeplabv3plus import DeepLabV3Plus
from common.distributed import add_up, world_size
from common.evaluate import evaluate
from common.run import Run


def cps_run(folder, *flags: str) -> Run:
    """A run of CPS on small crops, in an empty folder; its loop is up to the caller."""
    small = ["--crop-size", "32", "--dropout", "0", "--device", "cpu", "--output-dir", str(folder)]
    return Run(cps.parse_args([*small, *flags]))


def test_a_loss_that_is_not_finite_names_iteration_and_images(begin):
    run = begin(cps)
    run.done, run.names = 3, ["a", "b"]
    run.check_finite(torch.tensor(1.0))
    run.done, run.names = 4, ["c", "d"]
    with pytest.raises(runtime.NotFinite, match=r"nan at iteration 5; its images: c, d"):
        run.check_finite(torch.tensor(math.nan))


def test_a_first_step_that_fp16_leaves_out_counts_and_does_not_warn(begin):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = begin(cps, "--amp", "fp16")
        weight = nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / 10)
        run.step(1e38 * weight.sum(), optimizer)  # times the scale: infinite
        scheduler.step()
    assert weight.item() == 1 and scheduler.last_epoch == 1
    assert scheduler.get_last_lr() == [0.9]


# ----------------------------------------------------------------------------------- two processes


def one_step(folder, rank: int, flags: list[str], batch: int) -> dict:
    """Loss, gradient and BatchNorm's statistics after a real CPS step, and an evaluation."""
    run = cps_run(folder, "-b", str(batch), *flags)
    args, data = run.args, run.data
    networks = {
        name: run.place(DeepLabV3Plus.from_settings(args, data.num_classes)) for name in ("1", "2")
    }
    f1, f2 = (run.parallel(network) for network in networks.values())
    parameters = [p for network in networks.values() for p in network.parameters()]
    streams = (0, 1, 2) if args.cutmix else (0, 1)
    items = (data.labelled, data.unlabelled, data.unlabelled)
    batch_l, *batches_u = (
        next(iter(run.batches(part, stream))) for part, stream in zip(items, streams)
    )
    if rank == 0:
        batch_l["target"][0, :20] = 255  # processes with different numbers of valid pixels
    measured = cps.train_step(f1, f2, batch_l, batches_u, 0, args, data.background)
    run.step(measured["loss"], torch.optim.SGD(parameters, lr=0.0))

    gradients, statistics = {}, {}
    for name, network in networks.items():
        gradients |= {f"{name}.{key}": p.grad.clone() for key, p in network.named_parameters()}
        statistics |= {f"{name}.{key}": value.clone() for key, value in network.named_buffers()}
    return {
        "loss": add_up(measured["loss"].detach()) / world_size(),
        "gradients": gradients,
        "statistics": statistics,
        "matrix": evaluate({"n": networks["1"]}, data.val[:33], data, args)["n"].confusion_matrix,
    }


def meet(rank: int, folder: str) -> None:
    """Join the other of two processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )


def step_worker(rank: int, flags: list[str], folder: str) -> None:
    meet(rank, folder)
    torch.save(one_step(f"{folder}/two", rank, flags, batch=2), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("flags", [[], ["--no-cutmix"], ["--soft"]])
def test_two_processes_do_what_one_does_with_the_doubled_batch(
    flags: list[str], tmp_path, monkeypatch
):
    monkeypatch.setattr(runtime, "catch_signals", lambda: None)  # in this process
    mp.spawn(step_worker, (flags, str(tmp_path)), nprocs=2)
    two = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    one = one_step(tmp_path / "one", 0, flags, batch=4)
    torch.testing.assert_close(two[0]["loss"], one["loss"], rtol=1e-5, atol=0)
    for name, gradient in one["gradients"].items():
        first, second = (part["gradients"][name] for part in two)
        assert torch.equal(first, second)
        atol = 5e-5 * gradient.abs().max().item()
        torch.testing.assert_close(first, gradient, rtol=1e-3, atol=atol)
    for name, value in one["statistics"].items():
        first, second = (part["statistics"][name] for part in two)
        assert torch.equal(first, second)
        torch.testing.assert_close(first, value, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(part["matrix"], one["matrix"]) for part in two)


def signals_worker(rank: int, folder: str) -> None:
    meet(rank, folder)
    run = cps_run(f"{folder}/run")
    if rank == 1:
        runtime._arrived.append(15)
    answers = [run.signal() for _ in range(10)]
    assert answers == [None] * 9 + [15]  # the process without a signal stops in the same iteration
    torch.distributed.destroy_process_group()


def test_signals_are_agreed_upon(tmp_path):
    mp.spawn(signals_worker, (str(tmp_path),), nprocs=2)
