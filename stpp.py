"""ST++: self-training with selective re-training; --plain is ST.

Yang, Zhuo, Qi, Shi, Gao; CVPR 2022, arXiv:2106.05095.

1. Train a teacher on the labelled images; keep its checkpoints T_1, T_2, T_3 at a third, two thirds
   and the end of training.
2. Score each unlabelled image by how little its prediction still changes:             [section 3.3]
       s_i = sum_{j<3} meanIoU(M_ij, M_i3),   M_ij = argmax T_j(u_i),   classes in either
   The half with the highest scores is reliable.
3. Label the reliable images with the teacher: argmax of the sum of softmaxes over five scales, each
   with its mirror image.
4. Train a new student on the labelled images, repeated until they are as many, and the
   pseudo-labelled ones. The latter are strongly augmented: colour jitter, grey, blur, Cutout (the
   label is 255 inside).                                                               [section 3.2]
5. Label the rest with that student, and train a last network, again from the start, on all images.
   It is the result.
ST does not select: every unlabelled image is labelled by the teacher, and the student of step 4 is
the result.

Each training is a stage with a run folder of its own, RUN/stage-1, RUN/stage-2; the last one's is
RUN itself. Masks go to RUN/pseudo_masks/STAGE/ID.png (the stage whose network made them), scores to
RUN/reliability.csv.

| symbol | variable       | symbol   | variable         | symbol     | variable                    |
|--------|----------------|----------|------------------|------------|-----------------------------|
| T_j    | checkpoints    | M_ij     | predictions      | s_i        | scores                      |
| u_i    | images, items  | reliable | reliable (names) | strong aug | strong (see `load_batches`) |

Differences from the paper and the released code:
1. The teacher is the last checkpoint. The release takes the best on the validation set, also after
   step 4: --teacher best.
2. The score is the paper's sum. The release divides it by two, which ranks alike.
3. T_1 and T_2 are taken after a third and two thirds of the iterations. The release takes them at
   the end of an epoch: 26, 53 and 80 of 80 on VOC.
4. Padded pixels have the label 255, as released, but another colour: here they are 0 after
   normalisation, the mean colour. In the release they are black, and jitter, blur and Cutout change
   them like the image.
5. Test-time augmentation rounds the scaled sizes; the release cuts the fraction off. Here the
   logits are interpolated to the size of the image before the softmax. The release takes the
   softmax at the scaled size and interpolates probabilities.
6. The blur is torchvision's, 13 pixels wide. The release uses PIL's, which approximates a Gaussian
   by box filters; σ has the same law.
7. The network is this project's DeepLabv3+, with dropout 0.5 after ASPP; the release has another of
   0.1 before its classifier.
8. BatchNorm sees the whole batch of 16. The released command splits it over two GPUs, each of which
   normalises its 8 images alone.

    python stpp.py                                           # built-in data, a CPU, about 3 minutes
    python stpp.py --plain --data voc --data-dir VOCdevkit --split 1/8 --amp bf16
"""

import argparse
import csv
import functools
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import InputError, checkpoint, cli, datasets, runtime
from common.augment import colour_jitter_and_blur, cutout, normalise
from common.data import equal_size_loader, train_loader
from common.data import load_data as load_source
from common.datasets import DataSource, Item
from common.deeplabv3plus import DeepLabV3Plus, full_softmax, parameter_groups
from common.evaluate import Scores, image_miou, scores, update, validate
from common.figures import reliability_figure
from common.losses import labelled_loss
from common.masks import read_mask, write_mask
from common.report import Report, claim
from common.runtime import Runtime
from kernels import pseudo_label

# voc, cityscapes: the released configurations; an epoch passes over the list of the stage. shapes, camvid: as elsewhere.
# fmt: off
PRESETS = {
    "shapes": {"max_iters": 1400, "lr": 0.1, "crop_size": 64, "batch_size": 8, "head_lr_mult": 1.0, "decay_norm": False,
               "scale": "0.5,0.75,1,1.5,1.75,2"},
    "camvid": {"epochs": 300, "lr": 0.01, "weight_decay": 4e-4, "crop_size": 320, "batch_size": 8, "head_lr_mult": 1.0,
               "decay_norm": False, "scale": "0.5,0.75,1,1.5,1.75,2"},
    "voc": {"epochs": 80, "lr": 0.001, "crop_size": 321, "output_stride": 8, "scale": "long:200-800"},
    "cityscapes": {"epochs": 240, "lr": 0.004, "crop_size": 721, "output_stride": 8, "scale": "long:1024-4096",
                   "eval_window": 0},
    "folder": {"epochs": 80, "lr": 0.001, "crop_size": 321, "scale": "long:200-800"},
}
# fmt: on
EVERYWHERE = {"batch_size": 16, "weight_decay": 1e-4, "head_lr_mult": 10.0, "decay_norm": True, "ohem": None}
PRESETS = {name: {**EVERYWHERE, **preset} for name, preset in PRESETS.items()}
MEASURES, EVALUATIONS = (), ()
CHECKPOINTS = 3  # K in the paper
SCALES = (0.5, 0.75, 1.0, 1.5, 2.0)  # of the test-time augmentation
REPEAT_BELOW = 200  # labelled pictures; fewer are listed twice in stage 1


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of a run: the shared flags and those of ST++; schedules count for each stage."""
    parser = cli.parser(__doc__, PRESETS)
    group = parser.add_argument_group("ST++", "--epochs and --max-iters count for each of its two or three trainings")
    group.add_argument("--plain", action="store_true", help="ST: re-train once, on all pictures (--selection all)")
    group.add_argument(
        "--selection",
        choices=["reliable", "random", "all"],
        help="what to label first: the reliable half, a random half, or all at once (Table 6; default: reliable)",
    )
    group.add_argument(
        "--strong-aug",
        choices=["unlabelled", "labelled", "both", "none"],
        default="unlabelled",
        help="which pictures to augment strongly in re-training (Table 5; default: unlabelled)",
    )
    group.add_argument("--teacher", choices=["last", "best"], default="last", help="checkpoint that labels (default: last)")
    group.add_argument("--no-tta", dest="tta", action="store_false", help="label without scales and mirror images")
    given, _ = parser.parse_known_args(argv)
    if given.plain and given.selection not in (None, "all"):
        parser.error(f"--plain selects nothing; leave --selection {given.selection} out")
    chosen = given.selection or ("all" if given.plain else "reliable")
    method = {"all": "stpp-plain", "reliable": "stpp", "random": "stpp-random"}[chosen]
    args = cli.finish(parser, PRESETS, method, argv)
    args.selection = args.selection or ("all" if args.plain else "reliable")
    return args


def stage_count(args: argparse.Namespace) -> int:
    """Networks to train: two in ST, three in ST++."""
    return 2 if args.selection == "all" else 3


def stage_folder(args: argparse.Namespace, stage: int) -> Path:
    """Run folder of a stage; the last one's is the run's."""
    return Path(args.run) if stage == stage_count(args) else Path(args.run) / f"stage-{stage}"


def load_data(args: argparse.Namespace, rt: Runtime) -> DataSource:
    """The data set, with the list that the stage `args.stage` trains on as its labelled pictures."""
    data = load_source(args, rt)
    if args.stage == 1:
        return replace(data, labelled=data.labelled * (2 if len(data.labelled) < REPEAT_BELOW else 1), unlabelled=())
    reliable = read_reliable(args)
    pseudo = []
    for item in data.unlabelled:
        maker = 1 if reliable is None or item.name in reliable else 2
        if maker < args.stage:
            pseudo.append(Item(item.name, item.image, mask_path(args, maker, item.name), pseudo=True))
    datasets.check_files(item.mask for item in pseudo)
    repeated = data.labelled * math.ceil(len(pseudo) / len(data.labelled))
    return replace(data, labelled=repeated + tuple(pseudo), unlabelled=())


def build_networks(args: argparse.Namespace, data: DataSource, rt: Runtime) -> dict[str, nn.Module]:
    """The network of a stage, from the start."""
    network = DeepLabV3Plus(args.backbone, data.num_classes, args.weights, args.output_stride, args.dropout)
    return {"model": rt.place(network)}


def strong_augment(sample: dict, item: Item, which: str) -> dict:
    """Jitter, blur and Cutout for the pictures that `which` (`--strong-aug`) names; others as they are."""
    if which == "none" or (which != "both" and item.pseudo != (which == "unlabelled")):
        return sample
    image, target = cutout(colour_jitter_and_blur(sample["image"]), sample["target"])
    return {**sample, "image": image, "target": target}


def load_batches(args: argparse.Namespace, data: DataSource, rt: Runtime, start: int, stop: int) -> Iterator[tuple[dict, ...]]:
    """The batches of iterations `start` to `stop`: true and pseudo-labels from one shuffled list."""
    strong = functools.partial(strong_augment, which=args.strong_aug) if args.stage > 1 else None
    return zip(train_loader(data, data.labelled, args.stage, args, rt, start, stop, strong))


# ---------------------------------------------------------------------------------------------------------- the method


def train_step(
    networks: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    batches: list[dict],
    iteration: int,
    args: argparse.Namespace,
    data: DataSource,
    rt: Runtime,
) -> dict[str, Tensor]:
    """Steps 1, 4 and 5: one iteration of a stage; returns what to log, scalars on the device."""
    (batch,) = batches
    with rt.autocast():
        logits = networks["model"](normalise(batch["image"], batch["valid_mask"]))  # (N,C,H/4,W/4)
    loss = labelled_loss(logits, batch["target"], args.ohem, rt, args.kernels)
    rt.step(loss, optimizer)
    if args.stage == 1:
        keep_checkpoint(networks["model"], iteration + 1, args, data, rt)
    return {"loss": loss}


def keep_checkpoint(network: nn.Module, done: int, args: argparse.Namespace, data: DataSource, rt: Runtime) -> None:
    """Step 1: write RUN/stage-1/checkpoint-J.pt where `done` iterations are ceil(J·T/3) of the stage's T."""
    total = cli.Schedule(args, len(data.labelled), rt.world).total
    for j in range(1, CHECKPOINTS + 1):
        if done == math.ceil(j * total / CHECKPOINTS):
            networks = {"model": runtime.unwrap(network)}
            if rt.is_main:
                checkpoint.write(checkpoint.header(done, args, networks), stage_folder(args, 1) / f"checkpoint-{j}.pt")


def reliability(predictions: list[Tensor], num_classes: int) -> Tensor:
    """Step 2: s_i = sum_{j<K} meanIoU(M_ij, M_iK) of K label maps (N,H,W); (N,) float64 in [0,K-1]."""
    *earlier, last = predictions
    return sum(image_miou(prediction, last, num_classes) for prediction in earlier)


def label_pictures(network: nn.Module, images: Tensor, tta: bool, impl: str = "auto") -> Tensor:
    """Step 3: labels (N,H,W) uint8 of normalised images (N,3,H,W), with test-time augmentation if `tta`."""
    height, width = images.shape[2:]
    if not tta:
        return pseudo_label(network(images), (height, width), impl=impl).label
    total = 0
    for scale in SCALES:
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        scaled = F.interpolate(images, size=size, mode="bilinear", align_corners=True)
        for mirrored in (False, True):
            logits = network(scaled.flip(3) if mirrored else scaled)
            probs = full_softmax(logits, (height, width))
            total = total + (probs.flip(3) if mirrored else probs)
    return pseudo_label(total, impl=impl).label


def score(
    networks: dict[str, nn.Module],
    args: argparse.Namespace,
    data: DataSource,
    rt: Runtime,
    final: bool,
) -> tuple[dict[str, Scores], dict[str, float]]:
    """Evaluate the network of the stage."""
    return validate({"network": networks["model"]}, data, args, rt)


# ------------------------------------------------------------------------------------------ between the stages: labelling


def mask_path(args: argparse.Namespace, stage: int, name: str) -> Path:
    """Where the mask lies that the network of `stage` made for picture `name`."""
    return Path(args.run) / "pseudo_masks" / str(stage) / f"{name}.png"


def load_trained(args: argparse.Namespace, data: DataSource, rt: Runtime, path: Path) -> nn.Module:
    """A network in eval mode with the weights of a checkpoint."""
    networks = build_networks(args, data, rt)
    checkpoint.load_networks(checkpoint.read(path), networks, path)
    return networks["model"].eval()


def read_reliable(args: argparse.Namespace) -> set[str] | None:
    """Names of the pictures that are labelled first, from reliability.csv; None where all are."""
    if args.selection == "all":
        return None
    with open(Path(args.run) / "reliability.csv", newline="") as file:
        return {row["id"] for row in csv.DictReader(file) if row["reliable"] == "1"}


@torch.no_grad()
def select(args: argparse.Namespace, data: DataSource, rt: Runtime) -> None:
    """Step 2: score the unlabelled pictures and write reliability.csv; with true masks at hand, the figure too."""
    path = Path(args.run) / "reliability.csv"
    done = path.is_file()
    rt.barrier()  # all processes have looked before the first one writes
    if done:
        return
    scored: dict[str, tuple[float, float]] = {}  # name -> score, mIoU against the truth or NaN
    if args.selection == "random":
        order = torch.randperm(len(data.unlabelled), generator=torch.Generator().manual_seed(args.seed)).tolist()
        scored = {item.name: (float(rank), math.nan) for rank, item in zip(order, data.unlabelled)}
    else:
        paths = [stage_folder(args, 1) / f"checkpoint-{j}.pt" for j in range(1, CHECKPOINTS + 1)]
        checkpoints = [load_trained(args, data, rt, path) for path in paths]
        masked = {item.name: item for item in data.audit}  # to measure with, never to train on
        items = tuple(masked.get(item.name, item) for item in data.unlabelled)
        with_truth = [tuple(item for item in items if (item.mask is not None) == known) for known in (False, True)]
        for part in with_truth:
            for batch in equal_size_loader(data, part, args, rt):
                rt.check_signal()
                batch = rt.to_device(batch)
                with rt.autocast():
                    predictions = [label_pictures(f, normalise(batch["image"]), False, args.kernels) for f in checkpoints]
                values = reliability(predictions, data.num_classes).tolist()
                truth = [math.nan] * len(values)
                if "target" in batch:
                    truth = image_miou(batch["target"], predictions[-1], data.num_classes).tolist()
                scored.update(zip(batch["name"], zip(values, truth)))
        scored = rt.gather(scored)
    ranked = sorted(scored, key=lambda name: (-scored[name][0], name))
    reliable = set(ranked[: len(ranked) // 2])
    if rt.is_main:
        known = [name for name in ranked if not math.isnan(scored[name][1])]
        if known:
            points = [(scored[name][0], scored[name][1], name in reliable) for name in known]
            reliability_figure(points, Path(args.run) / "figures" / "reliability.png")
        part = path.with_suffix(".part")
        with open(part, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "score", "reliable"])
            writer.writerows([name, f"{scored[name][0]:.6f}", int(name in reliable)] for name in ranked)
        part.replace(path)
    rt.barrier()


@torch.no_grad()
def write_masks(stage: int, items: tuple[Item, ...], args: argparse.Namespace, data: DataSource, rt: Runtime) -> None:
    """Steps 3 and 5: label pictures with the network of a stage; masks that are there already stay."""
    missing = tuple(item for item in items if not mask_path(args, stage, item.name).is_file())
    rt.barrier()  # all processes have looked before the first one writes
    if missing:
        network = load_trained(args, data, rt, stage_folder(args, stage) / f"{args.teacher}.pt")
        with ThreadPoolExecutor(2) as pool:
            pending = []
            for batch in equal_size_loader(data, missing, args, rt):
                rt.check_signal()
                images = normalise(rt.to_device(batch)["image"])
                with rt.autocast():
                    labels = label_pictures(network, images, args.tta, args.kernels).cpu()
                for name, label in zip(batch["name"], labels):
                    pending.append(pool.submit(write_mask, mask_path(args, stage, name), label, data.colours))
                while len(pending) > 64:  # no more masks wait than this
                    pending.pop(0).result()
            for future in pending:
                future.result()
        rt.barrier()
    report_masks(stage, items, args, data, rt)


def report_masks(stage: int, items: tuple[Item, ...], args: argparse.Namespace, data: DataSource, rt: Runtime) -> None:
    """Print how good the masks are, where true masks are available, and keep it in RUN/pseudo_masks/STAGE.json."""
    names = {item.name for item in items}
    known = tuple(item for item in data.audit if item.name in names)
    matrix = torch.zeros(data.num_classes, data.num_classes, dtype=torch.int64)
    for sample in equal_size_loader(data, known, args, replace(rt, rank=0, world=1), pixels=1) if rt.is_main else ():
        update(matrix, sample["target"][0], read_mask(mask_path(args, stage, sample["name"][0])))
    if known and rt.is_main:
        result = scores(matrix)
        quality = f"accuracy {100 * result.accuracy:.2f}, mIoU {100 * result.miou:.2f}"
        print(f"pseudo-masks of stage {stage}: {quality} on {len(known)} pictures with true masks", flush=True)
        found = {"pictures": len(known), "accuracy": result.accuracy, "miou": result.miou}
        checkpoint.write(found, Path(args.run) / "pseudo_masks" / f"{stage}.json")


# --------------------------------------------------------------------------------------------------------- the stages


def run(args: argparse.Namespace) -> None:
    """All stages; those that are finished are not run again."""
    rt = runtime.start(args)
    count = stage_count(args)
    if getattr(args, "stage", count) < count:
        raise InputError(f"{args.output_dir} is one stage of a run; resume the run itself, the folder above")
    args.run, args.stage = args.output_dir, count
    if not args.resume and any(checkpoint.occupied(stage_folder(args, stage)) for stage in range(1, count + 1)):
        raise InputError(f"{args.run} holds a run already; go on with --resume {args.run}, or choose another --output-dir")
    if args.eval_only and not (Path(args.run) / "last.pt").is_file():
        raise InputError(f"--eval-only: the last stage of {args.run} has no checkpoint yet")
    data = load_source(args, rt)
    check_unlabelled(args, data)
    rt.barrier()
    claimed = claim(Path(args.run)) if rt.is_main else None  # before anything is written: another run may be at work there
    if rt.is_main and not args.resume:  # for --resume, until the last stage writes its own
        checkpoint.write({"args": vars(args)}, Path(args.run) / "args.json")
    check_stages(args)
    for stage in range(1, count + 1):
        folder = stage_folder(args, stage)
        if stage == count or not (args.eval_only or (folder / "finished").is_file()):
            say(rt, f"stage {stage} of {count}: train on {stage_text(args, stage)}")
            resume = args.resume and begun(folder)
            main(argparse.Namespace(**{**vars(args), "stage": stage, "output_dir": str(folder), "resume": resume}))
            if stage == count:
                break
            rt = runtime.start(args)  # `main` had one of its own
            rt.agree_to_stop()
            if rt.is_main:
                (folder / "finished").touch()
        if args.eval_only:
            continue
        torch.backends.cudnn.benchmark = False  # pictures of many sizes; the next training sets it again
        if stage == 1 and args.selection != "all":
            say(rt, f"select the {args.selection} half of {len(data.unlabelled)} unlabelled pictures")
            select(args, data, rt)
        reliable = read_reliable(args)
        items = tuple(item for item in data.unlabelled if reliable is None or (item.name in reliable) == (stage == 1))
        say(rt, f"label {len(items)} pictures with the network of stage {stage}")
        write_masks(stage, items, args, data, rt)
        rt.agree_to_stop()
    if claimed:
        claimed.close()


def check_unlabelled(args: argparse.Namespace, data: DataSource) -> None:
    """Refuse data that a later stage could not train on, before the first stage does."""
    needed = 1 if args.selection == "all" else 2  # two halves
    if len(data.unlabelled) < needed:
        raise InputError(
            f"{data.protocol}: re-training needs at least {needed} unlabelled images; use supervised.py, or a smaller --split"
        )


def check_stages(args: argparse.Namespace) -> None:
    """Refuse to go on with stages that were trained with other settings than the run's own."""
    wanted = json.loads(json.dumps(vars(args)))  # as they are read back: tuples are lists
    own = {"stage", "output_dir", "run", *cli.FREE_ON_RESUME}
    for stage in range(1, stage_count(args)):
        folder = stage_folder(args, stage)
        if not begun(folder):
            continue
        found = checkpoint.read_description(folder)["args"]
        other = [f"{key}={found[key]}" for key in found if key not in own and found[key] != wanted.get(key)]
        if other:
            raise InputError(f"{folder} was trained with {', '.join(other)}, unlike the run; choose another --output-dir")


def stage_text(args: argparse.Namespace, stage: int) -> str:
    """What a stage trains on."""
    if stage == 1:
        return "labelled pictures"
    return "labelled and pseudo-labelled pictures" + (" of the first half" if stage < stage_count(args) else "")


def begun(folder: Path) -> bool:
    """Whether the training of a stage has written its own args.json."""
    return (folder / "args.json").is_file() and "versions" in checkpoint.read_description(folder)


def say(rt: Runtime, text: str) -> None:
    """Print on the first process."""
    if rt.is_main:
        print(f"\n== {text}", flush=True)


def main(args: argparse.Namespace) -> None:
    """Data -> networks -> optimiser -> resume -> loop -> evaluate -> save. These lines are the same in every script."""
    rt = runtime.start(args)
    data = load_data(args, rt)
    schedule = cli.Schedule(args, len(data.unlabelled) or len(data.labelled), rt.world)
    report = Report(args, data, rt, schedule, MEASURES, EVALUATIONS)

    networks = build_networks(args, data, rt)
    trained = [network for network in networks.values() if any(parameter.requires_grad for parameter in network.parameters())]
    groups = [
        group
        for network in trained
        for group in parameter_groups(network, args.lr, args.head_lr_mult, args.weight_decay, args.decay_norm)
    ]
    optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)
    callables = {name: rt.wrap(network) if network in trained else network for name, network in networks.items()}

    states = {"optimizer": optimizer, "scheduler": scheduler, "scaler": rt.scaler, "report": report}
    last = Path(args.output_dir) / "last.pt"
    start = checkpoint.resume(last if args.resume else None, args, networks, states, rt)
    report.begin(start, networks)
    if args.eval_only:
        results, _ = score(networks, args, data, rt, final=True)
        report.finish(results, next(iter(networks.values())))
        return

    batches = iter(load_batches(args, data, rt, start, schedule.total))
    for done in range(start, schedule.total + 1):  # `done` iterations lie behind
        stopping = rt.stopping()
        if done > start and (stopping or schedule.saves(done)):
            checkpoint.save(last, done, args, networks, states, rt)
        if stopping:
            raise runtime.Stopped(rt.signal)
        if schedule.evaluates(done):  # after saving: a run that dies here evaluates again when it is resumed
            results, measured = score(networks, args, data, rt, final=done == schedule.total)
            report.evaluation(done, next(iter(results.values())), networks, measured)
        if done == schedule.total:
            break
        with checkpoint.saved_first(last, done, args, networks, states, rt):
            batch = [rt.to_device(part) for part in next(batches)]
        measured = train_step(callables, optimizer, batch, done, args, data, rt)
        rt.check_finite(measured["loss"], done + 1, [name for part in batch for name in part["name"]])
        report.iteration(done + 1, measured, scheduler.get_last_lr()[0])
        scheduler.step()
    report.finish(results, next(iter(networks.values())))


if __name__ == "__main__":
    runtime.launch(run, parse_args())
