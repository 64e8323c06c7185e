"""Steps and losses of a run, and two processes against one."""

import copy
import functools
import math
import warnings
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import ael
import cps
import mean_teacher
import psmt
import supervised
import unimatch
from common import checkpoint, runtime
from common.adaptive import ConfidenceBank, ImagePool, pasted_classes
from common.augment import normalise
from common.deeplabv3plus import DeepLabV3Plus
from common.distributed import add_up, world_size
from common.evaluate import evaluate, scores
from common.run import Run, sgd


def begun(script: ModuleType, folder, *flags: str) -> Run:
    """A run of a script on small crops, in an empty folder; its loop is up to the caller."""
    small = ["--crop-size", "32", "--dropout", "0", "--device", "cpu", "--output-dir", str(folder)]
    return Run(script.parse_args([*small, *flags]))


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


def test_the_optimiser_has_the_rates_and_decays_of_the_settings():
    """Those of every network, with momentum 0.9."""
    networks = [DeepLabV3Plus("tiny", 6) for _ in range(2)]
    for decay_norm in (False, True):
        flags = {"lr": 0.5, "head_lr_mult": 3.0, "weight_decay": 0.25, "decay_norm": decay_norm}
        optimizer = sgd(networks, SimpleNamespace(**flags))
        found = {
            part: (group["lr"], group["weight_decay"], group["momentum"])
            for group in optimizer.param_groups
            for part in group["params"]
        }
        decay = 0.25 if decay_norm else 0.0
        for network in networks:
            assert found.keys() >= set(network.parameters())
            assert found[network.backbone.stem[0][0].weight] == (0.5, 0.25, 0.9)
            assert found[network.backbone.stem[0][1].weight] == (0.5, decay, 0.9)
            assert found[network.classifier.weight] == (1.5, 0.25, 0.9)
            assert found[network.classifier.bias] == (1.5, decay, 0.9)


def test_best_pt_is_of_the_best_evaluation_and_not_of_the_last(begin):
    run = begin(supervised)
    network = run.place(DeepLabV3Plus.from_settings(run.args, run.data.num_classes))
    run.keep(result="model", model=network)
    best = run.checkpoint.with_name("best.pt")
    for done, right, expected in ((10, 4, 10), (20, 7, 20), (30, 5, 20), (40, 7, 20)):
        run.done = done
        worse = scores(torch.tensor([[right - 1, 11 - right], [0, 10]]))
        result = scores(torch.tensor([[right, 10 - right], [0, 10]]))
        run.report({"other": worse, "model": result})
        assert checkpoint.read(best)["iteration"] == expected
    assert run.book.best == result.miou


def test_the_learning_rate_falls_with_every_iteration(begin):
    run = begin(supervised, "--max-iters", "10", "--lr", "0.5", "--head-lr-mult", "2")
    network = run.place(DeepLabV3Plus.from_settings(run.args, run.data.num_classes))
    optimizer = sgd([network], run.args)
    run.keep(result="model", model=network, optimizer=optimizer)
    for done in range(10):
        factor = (1 - done / 10) ** 0.9
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([0.5 * factor] * 2 + [factor] * 2)
        run.done = done
        run.step(sum(part.sum() for part in network.parameters()) * 0, optimizer)
        run.log({"loss": torch.tensor(1.0)})


def test_an_epoch_passes_over_the_unlabelled_images(begin):
    run = begin(cps, "--epochs", "3")
    assert (len(run.data.labelled), len(run.data.unlabelled)) == (32, 224)
    assert (run.schedule.per_epoch, run.schedule.total) == (224 // 4, 3 * 224 // 4)


# ----------------------------------------------------------------------------------- two processes


def first_batches(rank: int, *loaders) -> list[dict]:
    """The first batch of each loader; the processes have different numbers of labelled pixels."""
    batches = [next(iter(loader)) for loader in loaders]
    if rank == 0:
        batches[0]["target"][0, :20] = 255
    return batches


def cps_step(run: Run, rank: int) -> tuple[dict, dict]:
    """Networks and measures of a step of CPS."""
    args, data = run.args, run.data
    networks = {
        name: run.place(DeepLabV3Plus.from_settings(args, data.num_classes)) for name in ("1", "2")
    }
    trained = [run.parallel(network) for network in networks.values()]
    streams = (1, 2) if args.cutmix else (1,)
    batch_l, *batches_u = first_batches(
        rank,
        run.batches(data.labelled, 0),
        *(run.batches(data.unlabelled, stream) for stream in streams),
    )
    measured = cps.train_step(*trained, batch_l, batches_u, 0, args, data.background)
    run.step(measured["loss"], sgd([*networks.values()], args))
    return networks, measured


def unimatch_step(run: Run, rank: int) -> tuple[dict, dict]:
    """Network and measures of a step of UniMatch."""
    network = run.place(unimatch.Network.from_settings(run.args, run.data.num_classes))
    trained = run.parallel(network)
    strong = functools.partial(unimatch.add_strong_views, views=run.args.views)
    batches = first_batches(
        rank,
        run.batches(run.data.labelled, 0),
        run.batches(run.data.unlabelled, 1, strong),
        run.batches(run.data.unlabelled, 2, strong),
    )
    measured = unimatch.train_step(trained, *batches, 0, run.args)
    run.step(measured["loss"], sgd([network], run.args))
    return {"1": network}, measured


def classmix_step(run: Run, rank: int) -> tuple[dict, dict]:
    """Student and measures of a step of ClassMix."""
    args = run.args
    student = run.place(DeepLabV3Plus.from_settings(args, run.data.num_classes))
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    trained = run.parallel(student)
    batch_l, *batches_u = first_batches(
        rank, run.batches(run.data.labelled, 0), run.batches(run.data.unlabelled, 1)
    )
    measured = mean_teacher.classmix_step(trained, teacher, batch_l, batches_u, 1.0, 0, args)
    run.step(measured["loss"], sgd([student], args))
    return {"1": student}, measured


def ael_step(run: Run, rank: int) -> tuple[dict, dict]:
    """Student and measures of a step of AEL, with a pool from which each image gets its partner."""
    args, data = run.args, run.data
    student = run.place(ael.Network(args, data.num_classes))
    teacher = copy.deepcopy(student).requires_grad_(False).train()
    trained = run.parallel(student)
    *batches, earlier = first_batches(
        rank,
        run.batches(data.labelled, 0),
        run.batches(data.labelled, 1, scale=args.paste_scale),
        run.batches(data.unlabelled, 2),
        run.batches(data.unlabelled, 3),
    )
    bank = ConfidenceBank(data.num_classes, args.bank_momentum, run.device)
    bank.confidence.fill_(0.5)
    pool = ImagePool(args.pool, data.num_classes, args.crop_size, run.device)
    has = torch.ones(len(earlier["image"]), data.num_classes, dtype=torch.bool)
    pool.push(normalise(earlier["image"], earlier["valid_mask"]), earlier["valid_mask"], has)

    allowed = torch.tensor(pasted_classes(args, data))
    measured = ael.train_step(trained, teacher, bank, pool, allowed, batches, 11, args)
    run.step(measured["loss"], sgd([student], args))
    return {"1": student}, measured | {"pool": pool.images.float().std()}


def psmt_step(run: Run, rank: int) -> tuple[dict, dict]:
    """Student and measures of a step of PS-MT.

    Each process mixes its own images, and T-VAT starts from random numbers: here neighbours are
    mixed, and it starts from the features.
    """
    args, data = run.args, run.data
    student, teachers = psmt.build_networks(run, args)
    trained = run.parallel(student)
    for teacher in teachers:
        teacher.requires_grad_(False)
    batches = first_batches(
        rank,
        run.batches(data.labelled, 0, psmt.strong_view),
        run.batches(data.unlabelled, 1, psmt.strong_view),
    )
    boxes = psmt.beta_boxes

    def with_neighbour(count: int, *rest) -> tuple:
        return boxes(count, *rest)[0], torch.arange(count) ^ 1

    with (
        patch.object(psmt, "beta_boxes", with_neighbour),
        patch.object(torch, "rand_like", torch.sin),
    ):
        measured = psmt.train_step(trained, teachers, 1, *batches, 1.0, 7, args)
    run.step(measured["loss"], sgd([student], args))
    return {"1": student, "teacher": teachers[0]}, measured


MORE_OF_AEL = ["--labelled-consistency", "--no-aes", "--copy-classes", "30"]
SURE_OF_LITTLE = ["--conf-thresh", "0.1"]  # as an untrained network is
STEPS = {  # name -> script, flags, step
    "CPS": (cps, [], cps_step),
    "CPS without CutMix": (cps, ["--no-cutmix"], cps_step),
    "CPC": (cps, ["--soft"], cps_step),
    "UniMatch": (unimatch, [*SURE_OF_LITTLE, "--feature-dropout", "0"], unimatch_step),
    "ClassMix": (mean_teacher, [*SURE_OF_LITTLE, "--classmix", "labelled"], classmix_step),
    # Which pixels AES keeps is drawn in each process.
    "AEL": (ael, [*SURE_OF_LITTLE, *MORE_OF_AEL], ael_step),
    "PS-MT": (psmt, SURE_OF_LITTLE, psmt_step),
}


def one_step(folder, rank: int, name: str, batch: int) -> dict:
    """Losses, gradient and BatchNorm's statistics after a real step, and an evaluation."""
    script, flags, step = STEPS[name]
    run = begun(script, folder, "-b", str(batch), "--lr", "1e-30", *flags)
    networks, measured = step(run, rank)
    gradients, statistics = {}, {}
    for key, network in networks.items():
        learnt = {part: p for part, p in network.named_parameters() if p.requires_grad}
        gradients |= {f"{key}.{part}": p.grad.clone() for part, p in learnt.items()}
        statistics |= {f"{key}.{part}": value.clone() for part, value in network.named_buffers()}
    data, args = run.data, run.args
    return {
        "losses": {
            key: add_up(value.detach()) / world_size()
            for key, value in measured.items()
            if key != "overlap"  # of this process alone
        },
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


def step_worker(rank: int, name: str, folder: str) -> None:
    meet(rank, folder)
    torch.save(one_step(f"{folder}/two", rank, name, batch=2), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", STEPS)
def test_two_processes_do_what_one_does_with_the_doubled_batch(name: str, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "catch_signals", lambda: None)  # in this process
    mp.spawn(step_worker, (name, str(tmp_path)), nprocs=2)
    two = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    one = one_step(tmp_path / "one", 0, name, batch=4)
    assert all(value > 0 for value in one["losses"].values())
    for key, value in one["losses"].items():
        torch.testing.assert_close(two[0]["losses"][key], value, rtol=1e-5, atol=0)
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
    run = begun(cps, f"{folder}/run")
    if rank == 1:
        runtime._arrived.append(15)
    answers = [run.signal() for _ in range(10)]
    assert answers == [None] * 9 + [15]  # the process without a signal stops in the same iteration
    torch.distributed.destroy_process_group()


def test_signals_are_agreed_upon(tmp_path):
    mp.spawn(signals_worker, (str(tmp_path),), nprocs=2)
