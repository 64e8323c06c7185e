"""ST++: self-training with selective re-training; --plain is ST.

Yang, Zhuo, Qi, Shi, Gao; CVPR 2022, arXiv:2106.05095.

    stage 1   D_l -------------------------------> train --> T_1, T_2, T_3
    select    u_i --> T_1, T_2, T_3 --> M_i1, M_i2, M_i3 --> s_i --> D_u1 (reliable), D_u2 (rest)
    label     D_u1 --> T_3 --> ŷ
    stage 2   D_l, strongly augmented D_u1 ------> train --> S
    label     D_u2 --> S --> ŷ
    stage 3   D_l, strongly augmented D_u1, D_u2 -> train --> the result

1. Train a teacher on the labelled images; keep its checkpoints T_1, T_2, T_3 at a third, two thirds
   and the end of training.
2. Score each unlabelled image by how little its prediction still changes:             [section 3.3]
       s_i = sum_{j<3} meanIoU(M_ij, M_i3),   M_ij = argmax T_j(u_i),   classes in either
   The half with the highest scores is reliable.
3. Label the reliable images with the teacher: argmax of the sum of softmaxes over five scales (on
   the built-in set the four of training), each with its mirror image.
4. Train a new student on the labelled images, repeated until they are as many, and the
   pseudo-labelled ones: as many epochs as in step 1, which are longer now (shapes: twice as many
   iterations, --retrain-times). The latter are strongly augmented: colour jitter, grey, blur,
   Cutout (the label is 255 inside).                                                   [section 3.2]
5. Label the rest with that student, and train a last network, again from the start, on all images.
   It is the result.
ST does not select: every unlabelled image is labelled by the teacher, and the student of step 4 is
the result.

Each training is a stage with a run folder of its own, RUN/stage-1, RUN/stage-2; the last one's is
RUN itself. Masks go to RUN/pseudo_masks/STAGE/ID.png (the stage whose network made them), scores to
RUN/reliability.csv.

| symbol | variable         | symbol   | variable    | symbol     | variable       |
|--------|------------------|----------|-------------|------------|----------------|
| T_j    | checkpoint-J.pt  | M_ij     | predictions | s_i        | score_of       |
| u_i    | data.unlabelled  | D_u1     | reliable    | strong aug | strong_augment |

Differences from the paper and the released code:
1. The teacher is the last checkpoint. The release takes the best on the validation set, also after
   step 4: --teacher best. Its result, too, is the best checkpoint of the last training; here it is
   the last one.
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
7. The network is this project's DeepLabv3+, with dropout 0.5 (shapes 0.1) after ASPP; the
   release has another of 0.1 before its classifier. Its head starts with PyTorch's weights; here
   convolutions before a BatchNorm start with Kaiming's, by fan-out.
8. BatchNorm sees the whole batch of 16. The released command splits it over two GPUs, each of which
   normalises its 8 images alone.

    python stpp.py                                           # built-in data, a CPU
    python stpp.py --plain --data voc --data-dir VOCdevkit --split stpp-1/8 --amp bf16
"""

import argparse
import csv
import functools
import json
import math
import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import InputError, checkpoint, cli, distributed, runtime
from common.augment import IGNORE, colour_jitter_and_blur, normalise, uniform
from common.data import equal_size_loader, load_data
from common.deeplabv3plus import DeepLabV3Plus, full_softmax
from common.evaluate import device_of, evaluate, evaluating, image_miou, scores, update
from common.figures import reliability_figure
from common.losses import labelled_loss
from common.masks import read_mask, write_mask
from common.report import claim
from common.run import Run, place, sgd
from common.source import DataSource, Item, check_files
from kernels import pseudo_label

# voc, cityscapes: the released configurations; an epoch passes over the list of the stage.
# shapes, camvid: our own choice, the settings of cps.py for each stage; on shapes a re-training is
# twice as long as the first one. On voc it is longer, too, since its list is. folder: as voc, but
# with output stride 16.
SHAPES = {
    "backbone": "tiny",
    "weights": "blots",
    "output_stride": 8,
    "dropout": 0.1,
    "max_iters": 900,
    "retrain_times": 2.0,
    "batch_size": 8,
    "eval_iters": 450,
    "eval_window": 0,
    "crop_size": 64,
    "scale": "0.75,1,1.25,1.5",
    "tta_scales": (0.75, 1.0, 1.25, 1.5),  # those of training
    "lr": 0.03,
    "head_lr_mult": 3.0,
    "weight_decay": 1e-4,
    "decay_norm": False,
    "ohem": None,
}
CAMVID = {
    "backbone": "resnet50",
    "weights": "imagenet",
    "output_stride": 16,
    "dropout": 0.5,
    "epochs": 300,
    "retrain_times": 1.0,
    "batch_size": 8,
    "eval_interval": 10,
    "eval_window": 0,
    "crop_size": 320,
    "scale": "0.5,0.75,1,1.5,1.75,2",
    "tta_scales": (0.5, 0.75, 1.0, 1.5, 2.0),
    "lr": 0.01,
    "head_lr_mult": 1.0,
    "weight_decay": 4e-4,
    "decay_norm": False,
    "ohem": None,
}
VOC = {
    "backbone": "resnet50",
    "weights": "imagenet",
    "output_stride": 8,
    "dropout": 0.5,
    "epochs": 80,
    "retrain_times": 1.0,  # not with epochs: those of a longer list are longer
    "batch_size": 16,
    "eval_interval": 1,
    "eval_window": 0,
    "crop_size": 321,
    "scale": "long:200-800",
    "tta_scales": (0.5, 0.75, 1.0, 1.5, 2.0),  # of the test-time augmentation
    "lr": 0.001,
    "head_lr_mult": 10.0,
    "weight_decay": 1e-4,
    "decay_norm": True,
    "ohem": None,
}
CITYSCAPES = VOC | {
    "epochs": 240,
    "eval_interval": 8,  # our choice; released: 1
    "crop_size": 721,
    "scale": "long:1024-4096",
    "lr": 0.004,
}
FOLDER = VOC | {"output_stride": 16}
PRESETS = {
    "shapes": SHAPES,
    "shapes-zipf": SHAPES,
    "camvid": CAMVID,
    "voc": VOC,
    "cityscapes": CITYSCAPES,
    "folder": FOLDER,
}
CHECKPOINTS = 3  # K in the paper
REPEAT_BELOW = 200  # labelled images; fewer are listed twice in stage 1


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of a run: the shared flags and those of ST++; schedules count for each stage."""
    parser = cli.parser(__doc__, PRESETS)
    group = parser.add_argument_group(
        "ST++",
        "--epochs and --max-iters count for each of its two or three trainings, "
        "--retrain-times then for those after the first",
    )
    group.add_argument(
        "--plain", action="store_true", help="ST: re-train once, on all images (--selection all)"
    )
    group.add_argument(
        "--selection",
        choices=["reliable", "random", "all"],
        help="what to label first: the reliable half, a random half, or all at once "
        "(Table 6; default: reliable)",
    )
    group.add_argument(
        "--strong-aug",
        choices=["unlabelled", "labelled", "both", "none"],
        default="unlabelled",
        help="which images to augment strongly in re-training (Table 5; default: unlabelled)",
    )
    group.add_argument(
        "--retrain-times",
        type=float,
        metavar="K",
        help="iterations of a re-training by those of stage 1, where --max-iters counts; with "
        "--epochs it is as much longer as its list (default: 1, shapes 2)",
    )
    group.add_argument(
        "--teacher",
        choices=["last", "best"],
        default="last",
        help="checkpoint that labels (default: last)",
    )
    group.add_argument(
        "--no-tta", dest="tta", action="store_false", help="label without scales and mirror images"
    )
    given, _ = parser.parse_known_args(argv)
    if given.plain and given.selection not in (None, "all"):
        parser.error(f"--plain selects nothing; leave --selection {given.selection} out")
    chosen = given.selection or ("all" if given.plain else "reliable")
    method = {"all": "stpp-plain", "reliable": "stpp", "random": "stpp-random"}[chosen]
    args = cli.finish(parser, PRESETS, method, argv)
    args.selection = args.selection or ("all" if args.plain else "reliable")
    if not 0 < args.retrain_times < math.inf:
        parser.error("--retrain-times must be above 0")
    return args


def stage_count(args: argparse.Namespace) -> int:
    """Networks to train: two in ST, three in ST++."""
    return 2 if args.selection == "all" else 3


def stage_folder(args: argparse.Namespace, stage: int) -> Path:
    """Run folder of a stage; the last one's is the run's."""
    return Path(args.run) if stage == stage_count(args) else Path(args.run) / f"stage-{stage}"


def mask_path(args: argparse.Namespace, stage: int, name: str) -> Path:
    """Where the mask lies that the network of `stage` made for image `name`."""
    return Path(args.run) / "pseudo_masks" / str(stage) / f"{name}.png"


# --------------------------------------------------------------------------------------- the method


def cutout(pixels: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """ST's Cutout, with chance 0.5: a box of random pixels, ignored in the target.

    Area, aspect ratio and corner are drawn together and rejected together until the box lies inside
    the image. A large box seldom fits at a uniform corner, so small ones prevail: the mean area of
    a box is 0.14 of a square image, not the 0.21 of U(0.02, 0.4).

        area ~ U(0.02, 0.4) · H·W,   aspect = rows / columns ~ U(0.3, 1/0.3),
        corner uniform over the pixels

    Source: the released ST++.

    Args:
        pixels: (H,W,3) uint8.
        target: (H,W) uint8.

    Returns:
        New tensors, or the same ones where nothing is cut.
    """
    height, width = target.shape
    if uniform(0, 1) >= 0.5:
        return pixels, target
    while True:
        area = uniform(0.02, 0.4) * height * width
        aspect = uniform(0.3, 1 / 0.3)
        rows = int((area * aspect) ** 0.5)
        columns = int((area / aspect) ** 0.5)
        top = int(torch.randint(height, ()))
        left = int(torch.randint(width, ()))
        if top + rows <= height and left + columns <= width:
            break

    pixels, target = pixels.clone(), target.clone()
    # Values 0 to 254: the release draws U(0, 255) and drops the fraction.
    noise = torch.randint(0, 255, (rows, columns, 3), dtype=torch.uint8)
    pixels[top : top + rows, left : left + columns] = noise
    target[top : top + rows, left : left + columns] = IGNORE
    return pixels, target


def strong_augment(sample: dict, item: Item, which: str) -> dict:
    """Jitter, blur and Cutout for the images that `which` (`--strong-aug`) names."""
    chosen = {"none": False, "both": True, "unlabelled": item.pseudo, "labelled": not item.pseudo}
    if not chosen[which]:
        return sample
    image, target = cutout(colour_jitter_and_blur(sample["image"]), sample["target"])
    return {**sample, "image": image, "target": target}


def train_step(network: nn.Module, batch: dict, args: argparse.Namespace) -> dict[str, Tensor]:
    """Steps 1, 4 and 5: the loss of one iteration of a stage, on true and pseudo-labels alike."""
    logits = network(normalise(batch["image"], batch["valid_mask"]))  # (N,C,H/4,W/4)
    return {"loss": labelled_loss(logits, batch["target"], args.ohem)}


def reliability(predictions: list[Tensor], num_classes: int) -> Tensor:
    """Step 2: s_i = sum_{j<K} meanIoU(M_ij, M_iK).

    Args:
        predictions: K label maps (N,H,W), of the checkpoints in order.
        num_classes: C.

    Returns:
        (N,) float64 in [0,K-1].
    """
    *earlier, last = predictions
    return sum(image_miou(prediction, last, num_classes) for prediction in earlier)


def label_images(network: nn.Module, images: Tensor, scales: Sequence[float]) -> Tensor:
    """Steps 3 and 5: labels of images.

    They are the argmax of the sum of softmaxes over scales, each with its mirror image.

    Args:
        network: in eval mode.
        images: (N,3,H,W), normalised.
        scales: of the test-time augmentation; none for the image alone.

    Returns:
        (N,H,W) uint8.
    """
    height, width = images.shape[2:]
    if not scales:
        return pseudo_label(network(images), (height, width)).label
    total = 0
    for scale in scales:
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        scaled = F.interpolate(images, size=size, mode="bilinear", align_corners=True)
        for mirrored in (False, True):
            logits = network(scaled.flip(3) if mirrored else scaled)
            probs = full_softmax(logits, (height, width))
            total = total + (probs.flip(3) if mirrored else probs)
    return pseudo_label(total).label


def main(args: argparse.Namespace) -> None:
    """Algorithm 2 of the paper; every step returns at once if its output is there."""
    data = prepare(args)
    plain = args.selection == "all"
    if args.eval_only:
        train(stage_count(args), [], data, args)
        return

    train(1, [], data, args)  # T on D_l, and its checkpoints
    reliable = data.unlabelled if plain else select(data, args)  # D_u1, by s_i
    pseudo = label(1, reliable, data, args)  # by T
    train(2, pseudo, data, args)  # S on D_l and D_u1
    if not plain:
        first = {item.name for item in reliable}
        rest = [item for item in data.unlabelled if item.name not in first]  # D_u2
        pseudo = pseudo + label(2, rest, data, args)  # by S
        train(3, pseudo, data, args)  # S again, on D_l, D_u1 and D_u2


def prepare(args: argparse.Namespace) -> DataSource:
    """Claim the run's folder, keep its settings, and load the data.

    Raises:
        InputError: the folder is that of a stage or occupied, or the data does not suffice.
    """
    runtime.start(args)
    count = stage_count(args)
    if getattr(args, "stage", count) < count:
        raise InputError(
            f"{args.output_dir} is one stage of a run; resume the run itself, the folder above"
        )
    args.run, args.stage = args.output_dir, count
    stages = [stage_folder(args, stage) for stage in range(1, count + 1)]
    if not args.resume and any(map(checkpoint.occupied, stages)):
        raise InputError(
            f"{args.run} holds a run already; go on with --resume {shlex.quote(args.run)}, "
            "or choose another --output-dir"
        )
    if args.eval_only and not (Path(args.run) / "last.pt").is_file():
        raise InputError(f"--eval-only: the last stage of {args.run} has no checkpoint yet")
    data = load_data(args)
    check_unlabelled(args, data)
    distributed.barrier()
    if distributed.is_main():
        claim(Path(args.run))  # before anything is written: another run may be at work there
        if not args.resume:  # for --resume, until the last stage writes its own
            checkpoint.write({"args": vars(args)}, Path(args.run) / "args.json")
    check_stages(args)
    return data


def check_unlabelled(args: argparse.Namespace, data: DataSource) -> None:
    """Refuse data that a later stage could not train on, before the first stage does."""
    needed = 1 if args.selection == "all" else 2  # two halves
    if len(data.unlabelled) < needed:
        raise InputError(
            f"{data.protocol}: re-training needs at least {needed} unlabelled images; "
            "use supervised.py, or a smaller --split"
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
        other = [
            f"{key}={found[key]}"
            for key in found
            if key not in own and found[key] != wanted.get(key)
        ]
        if other:
            raise InputError(
                f"{folder} was trained with {', '.join(other)}, unlike the run; "
                "choose another --output-dir"
            )


def begun(folder: Path) -> bool:
    """Whether the training of a stage has written its own args.json."""
    return (folder / "args.json").is_file() and "versions" in checkpoint.read_description(folder)


def say(text: str) -> None:
    """Print a heading on the first process."""
    if distributed.is_main():
        print(f"\n== {text}", flush=True)


# ----------------------------------------------------------------------------------------- training


def train(stage: int, pseudo: list[Item], data: DataSource, args: argparse.Namespace) -> None:
    """Steps 1, 4 and 5: train the network of a stage in a run folder of its own.

    Args:
        stage: 1, 2 or 3; the last one is the run itself, and prints and draws again if finished.
        pseudo: pseudo-labelled images, none in stage 1.
        data: the data set.
        args: the settings of the run.
    """
    folder, last = stage_folder(args, stage), stage == stage_count(args)
    if not last and (folder / "finished").is_file():
        return
    parts = "labelled" if stage == 1 else "labelled and pseudo-labelled"
    half = "" if stage == 1 or last else " of the first half"
    say(f"stage {stage} of {stage_count(args)}: train on {parts} images{half}")
    own = {"stage": stage, "output_dir": str(folder), "resume": args.resume and begun(folder)}
    settings = argparse.Namespace(**{**vars(args), **own})
    train_network(settings, data, stage_list(data, pseudo))
    if not last:
        runtime.agree_to_stop(runtime.find_device(args))
        if distributed.is_main():
            (folder / "finished").touch()


def stage_list(data: DataSource, pseudo: list[Item]) -> list[Item]:
    """The images of a stage: labelled ones, repeated, then the others in the data's order.

    Without pseudo-labels a labelled list shorter than 200 stands twice; with them it is repeated
    ceil(U / L) times, until both kinds are about as many.
    """
    if not pseudo:
        return [*data.labelled] * (2 if len(data.labelled) < REPEAT_BELOW else 1)
    made = {item.name: item for item in pseudo}
    in_order = [made[item.name] for item in data.unlabelled if item.name in made]
    return [*data.labelled] * math.ceil(len(pseudo) / len(data.labelled)) + in_order


def train_network(args: argparse.Namespace, data: DataSource, items: list[Item]) -> None:
    """The training of a stage on `items`, true and pseudo-labels from one shuffled list."""
    run = Run(args, data, len(items), times=1 if args.stage == 1 else args.retrain_times)
    network = run.place(DeepLabV3Plus.from_settings(args, data.num_classes))
    optimizer = sgd([network], args)
    run.keep(result="model", model=network, optimizer=optimizer)
    trained = run.parallel(network)

    strong = functools.partial(strong_augment, which=args.strong_aug) if args.stage > 1 else None
    for iteration, (batch,) in run.iterations(run.batches(items, args.stage, strong)):
        if run.evaluates():
            run.report(evaluate({"model": network}, data.val, data, args), run.audit(network))
        measured = train_step(trained, batch, args)
        run.step(measured["loss"], optimizer)
        if args.stage == 1:
            keep_checkpoint(network, iteration + 1, run.schedule.total, args)
        run.log(measured)
    run.finish(evaluate({"model": network}, data.val, data, args), run.audit(network))


def keep_checkpoint(network: nn.Module, done: int, total: int, args: argparse.Namespace) -> None:
    """Step 1: write RUN/stage-1/checkpoint-J.pt where `done` iterations are ceil(J·T/3) of T."""
    for j in range(1, CHECKPOINTS + 1):
        if done == math.ceil(j * total / CHECKPOINTS) and distributed.is_main():
            content = checkpoint.header(done, args, {"model": network}, "model")
            checkpoint.write(content, Path(args.output_dir) / f"checkpoint-{j}.pt")


def load_trained(path: Path, data: DataSource, args: argparse.Namespace) -> nn.Module:
    """A network in eval mode, on the device, with the weights of a checkpoint."""
    network = DeepLabV3Plus.from_settings(args, data.num_classes)
    checkpoint.load_networks(checkpoint.read(path), {"model": network}, path)
    return place(network, args, runtime.find_device(args)).eval()


# ---------------------------------------------------------------------------------------- selection


def select(data: DataSource, args: argparse.Namespace) -> list[Item]:
    """Step 2: the half of the unlabelled images to label first; kept in RUN/reliability.csv."""
    path = Path(args.run) / "reliability.csv"
    done = path.is_file()
    distributed.barrier()  # all processes have looked before the first one writes
    if not done:
        say(f"select the {args.selection} half of {len(data.unlabelled)} unlabelled images")
        if args.selection == "random":
            score_of = random_scores(data, args.seed)
        else:
            score_of = reliability_scores(data, args)
        if distributed.is_main():
            write_scores(score_of, path)
        distributed.barrier()
    reliable = read_reliable(path)
    return [item for item in data.unlabelled if item.name in reliable]


def random_scores(data: DataSource, seed: int) -> dict[str, float]:
    """A random rank for every unlabelled image."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.unlabelled), generator=generator).tolist()
    return {item.name: float(rank) for rank, item in zip(order, data.unlabelled)}


@torch.no_grad()
def reliability_scores(data: DataSource, args: argparse.Namespace) -> dict[str, float]:
    """s_i of every unlabelled image, from the checkpoints of stage 1."""
    folder = stage_folder(args, 1)
    paths = [folder / f"checkpoint-{j}.pt" for j in range(1, CHECKPOINTS + 1)]
    networks = [load_trained(path, data, args) for path in paths]
    score_of = {}
    with evaluating(networks):
        for batch in equal_size_loader(data, data.unlabelled, args):
            runtime.check_signal()
            images = normalise(batch["image"].to(device_of(networks[0])))
            predictions = [label_images(network, images, scales=()) for network in networks]
            score_of.update(zip(batch["name"], reliability(predictions, data.num_classes).tolist()))
        score_of = distributed.merge(score_of)
        draw_reliability(score_of, networks[-1], data, args)
    return score_of


def halves(score_of: dict[str, float]) -> list[str]:
    """Names by falling score; the first floor(U/2) are the reliable ones."""
    return sorted(score_of, key=lambda name: (-score_of[name], name))


def write_scores(score_of: dict[str, float], path: Path) -> None:
    """Write reliability.csv, whole or not at all: name, score, and whether it is reliable."""
    ranked = halves(score_of)
    part = path.with_suffix(".part")
    with open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "score", "reliable"])
        for rank, name in enumerate(ranked):
            writer.writerow([name, f"{score_of[name]:.6f}", int(rank < len(ranked) // 2)])
    part.replace(path)


def read_reliable(path: Path) -> set[str]:
    """Names of the reliable half in reliability.csv."""
    with open(path, newline="", encoding="utf-8") as file:
        return {row["id"] for row in csv.DictReader(file) if row["reliable"] == "1"}


def draw_reliability(
    score_of: dict[str, float], network: nn.Module, data: DataSource, args: argparse.Namespace
) -> None:
    """Draw how good predictions are by their score, where there are true masks to measure with."""
    if not distributed.is_main() or not data.audit:
        return
    ranked = halves(score_of)
    reliable = set(ranked[: len(ranked) // 2])
    points = []
    for batch in equal_size_loader(data, data.audit, args, shared=False):
        device = device_of(network)
        prediction = label_images(network, normalise(batch["image"].to(device)), scales=())
        found = image_miou(batch["target"].to(device), prediction, data.num_classes).tolist()
        points += [
            (score_of[name], miou, name in reliable) for name, miou in zip(batch["name"], found)
        ]
    reliability_figure(points, Path(args.run) / "figures" / "reliability.png")


# ---------------------------------------------------------------------------------------- labelling


@torch.no_grad()
def label(
    stage: int, items: Sequence[Item], data: DataSource, args: argparse.Namespace
) -> list[Item]:
    """Steps 3 and 5: label images with the network of a stage; masks that are there already stay.

    Returns:
        The images with their pseudo-masks, to train on.
    """
    missing = [item for item in items if not mask_path(args, stage, item.name).is_file()]
    distributed.barrier()  # all processes have looked before the first one writes
    if missing:
        say(f"label {len(missing)} images with the network of stage {stage}")
        network = load_trained(stage_folder(args, stage) / f"{args.teacher}.pt", data, args)
        with evaluating([network]):
            write_masks(stage, network, missing, data, args)
        distributed.barrier()
    report_masks(stage, items, data, args)
    runtime.agree_to_stop(runtime.find_device(args))
    pseudo = [
        Item(item.name, item.image, mask_path(args, stage, item.name), pseudo=True)
        for item in items
    ]
    check_files(item.mask for item in pseudo)
    return pseudo


def write_masks(
    stage: int, network: nn.Module, items: list[Item], data: DataSource, args: argparse.Namespace
) -> None:
    """Label this process's share of images, and write the masks on threads of their own."""
    device = device_of(network)
    scales = args.tta_scales if args.tta else ()
    with ThreadPoolExecutor(2) as pool:
        pending = []
        for batch in equal_size_loader(data, items, args):
            runtime.check_signal()
            labels = label_images(network, normalise(batch["image"].to(device)), scales).cpu()
            for name, mask in zip(batch["name"], labels):
                path = mask_path(args, stage, name)
                pending.append(pool.submit(write_mask, path, mask, data.colours))
            while len(pending) > 64:  # no more masks wait than this
                pending.pop(0).result()
        for future in pending:
            future.result()


def report_masks(
    stage: int, items: Sequence[Item], data: DataSource, args: argparse.Namespace
) -> None:
    """Print how good the masks are, where true masks are at hand, and keep it in STAGE.json."""
    path = Path(args.run) / "pseudo_masks" / f"{stage}.json"
    names = {item.name for item in items}
    known = [item for item in data.audit if item.name in names]
    if not known or not distributed.is_main() or path.is_file():
        return
    matrix = torch.zeros(data.num_classes, data.num_classes, dtype=torch.int64)
    for sample in equal_size_loader(data, known, args, pixels=1, shared=False):
        made = read_mask(mask_path(args, stage, sample["name"][0]))
        update(matrix, sample["target"][0], made)
    result = scores(matrix)
    quality = f"accuracy {100 * result.accuracy:.2f}, mIoU {100 * result.miou:.2f}"
    print(
        f"pseudo-masks of stage {stage}: {quality} on {len(known)} images with true masks",
        flush=True,
    )
    found = {"images": len(known), "accuracy": result.accuracy, "miou": result.miou}
    checkpoint.write(found, path)


if __name__ == "__main__":
    runtime.launch(main, parse_args())
