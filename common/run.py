"""A training run: what every method needs around its loop, so that a script shows the loop itself.

run = Run(args)                                      # device, data, schedule, run folder
network = run.place(DeepLabV3Plus(...))              # on the device
optimizer = sgd([network], args)
run.keep(result="model", model=network, optimizer=optimizer)     # in checkpoints
trained = run.parallel(network)                      # DDP, --compile
batches = run.batches(run.data.labelled, stream=0)

for iteration, (batch,) in run.iterations(batches):  # saves; stops on signals
    if run.evaluates():
        run.report(...)                              # validation results
    losses = ...
    run.step(losses["loss"], optimizer)              # gradient and optimiser
    run.log(losses)
run.finish(...)                                      # last evaluation, figures, last line
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from common import checkpoint, distributed, figures, runtime, sync_batch_norm
from common.data import load_data, train_loader
from common.deeplabv3plus import DeepLabV3Plus, parameter_groups
from common.evaluate import Scores, pseudo_accuracy
from common.report import Report
from common.schedule import Schedule
from common.source import DataSource, Item

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
POLL_EVERY = 10  # iterations after which several processes ask each other for signals


class Run:
    """One training: data, schedule, run folder, checkpoints, log.

    Args:
        args: the settings, see `common.cli`.
        data: what to train on; None for the data set that the settings name.
        images: how many an epoch passes over; None for the unlabelled ones, or without any, the
            labelled ones.
        times: how many times as many iterations as the settings' `max_iters`; see `Schedule`.

    Attributes:
        device: where networks and batches are.
        data: the data set.
        schedule: iterations of an epoch and in all, and when to evaluate and save.
        done: iterations that lie behind.

    Raises:
        InputError: what the user gave cannot be used, or the run folder is occupied.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        data: DataSource | None = None,
        images: int | None = None,
        times: float = 1,
    ):
        self.args = args
        self.device = runtime.start(args)
        self.data = data or load_data(args)
        images = images or len(self.data.unlabelled) or len(self.data.labelled)
        self.schedule = Schedule(args, images, distributed.world_size(), times)
        self.book = Report(args, self.data, self.device, self.schedule)
        self.checkpoint = Path(args.output_dir) / "last.pt"
        self.networks: dict[str, nn.Module] = {}
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.amp == "fp16")
        self.states: dict[str, Any] = {"scaler": self.scaler, "report": self.book}
        self.schedulers: list[LambdaLR] = []
        self.start = self.done = self.polls = 0
        self.names: list[str] = []  # of the images of this iteration
        self.pending: tuple | None = None  # the last loss that `check_finite` has not looked at

    # ------------------------------------------------------------------------- networks and states

    def place(self, network: DeepLabV3Plus) -> DeepLabV3Plus:
        """Move a network to the device, before its optimiser is built; see the function `place`."""
        return place(network, self.args, self.device)

    def parallel(self, network: nn.Module) -> nn.Module:
        """The callable to train through, with the parameters of `network`: DDP, `--compile`.

        Keep it as long as you train: gradients are averaged over processes only while it lives.
        """
        if distributed.together():
            devices = [self.device] if self.device.type == "cuda" else None
            # Broadcasting buffers before each forward pass would break a second forward pass before
            # the backward pass; SyncBatchNorm keeps them equal.
            network = nn.parallel.DistributedDataParallel(network, devices, broadcast_buffers=False)
        return torch.compile(network) if self.args.compile else network

    def keep(self, result: str, **parts: Any) -> None:
        """Name all that a checkpoint must hold; with `--resume`, put its last state back.

        Args:
            result: the name, among `parts`, of the network that is the method's result.
            parts: networks, optimisers, and whatever else has a `state_dict`; None is left out.
                `best.pt` and `common.predict` know the networks alone.
        """
        self.result = result
        for name, part in parts.items():
            if part is None:
                continue
            if isinstance(part, nn.Module):
                self.networks[name] = part
                continue
            assert hasattr(part, "load_state_dict"), f"{name}: a {type(part).__name__} has no state"
            self.states[name] = part
            if isinstance(part, Optimizer):
                self.schedulers.append(LambdaLR(part, self.schedule.factor))
                self.states[f"{name}_schedule"] = self.schedulers[-1]
        assert result in self.networks, f"result {result!r}: not among {list(self.networks)}"
        self.start = checkpoint.resume(self.checkpoint, self.args, self.networks, self.states)
        self.done = self.start
        self.book.begin(self.start, self.networks)

    def say(self, text: str) -> None:
        """Print a line on the first process and keep it in log.txt."""
        self.book.say(text)

    # ------------------------------------------------------------------------------------- the loop

    def batches(
        self,
        items: Sequence[Item],
        stream: int,
        strong: Callable[[dict, Item], dict] | None = None,
        order: int | None = None,
        scale: str | None = None,
    ) -> Iterable[dict]:
        """Batches of `items` for the iterations that are left; `common.data.TrainSet` says of what.

        With `--eval-only` there are none. Call it after `keep`, which knows where a resumed run
        goes on.

        Args:
            items: labelled or unlabelled images.
            stream: a number of its own for each loader, whose shuffles and augmentations are then
                independent of the others'.
            strong: further augmentation of a sample.
            order: stream whose shuffles to follow; None for its own.
            scale: rule of the random scale; None for that of the settings.
        """
        assert self.networks or not self.args.resume, "keep() comes first"
        if self.args.eval_only:
            return []
        span = self.start, self.schedule.total
        return train_loader(self.data, items, stream, self.args, *span, strong, order, scale)

    def iterations(self, *loaders: Iterable[dict]) -> Iterator[tuple[int, list[dict]]]:
        """Number and batches, on the device, of each iteration that is left.

        With `--eval-only` there are no iterations.

        Between two iterations a checkpoint is written where the schedule wants one.

        Raises:
            Stopped: a signal arrived, and a checkpoint is written.
            InputError, WorkerDied: a batch could not be loaded; see `checkpoint.saved_first`.
        """
        if self.args.eval_only:
            return
        batches = zip(*loaders)
        for done in range(self.start, self.schedule.total + 1):
            self.done = done
            number = self.signal()
            if self.done > self.start and (number or self.schedule.saves(self.done)):
                self.save()
            if number:
                raise runtime.Stopped(number)
            if self.done == self.schedule.total:
                return
            with checkpoint.saved_first(self.save, self.done, self.args):
                batch = [to_device(part, self.device) for part in next(batches)]
            self.names = [name for part in batch for name in part["name"]]
            yield self.done, batch

    def step(self, loss: Tensor, optimizer: Optimizer) -> None:
        """Gradient and optimiser step, through the loss scaler where float16 needs it."""
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()

    def log(self, measures: dict[str, Tensor]) -> None:
        """End an iteration: record what it measured, and step the learning rate's schedule.

        Args:
            measures: scalar tensors on the device, "loss" among them. Those whose names begin with
                `loss` are losses; all others are shares in [0,1], and shown in percent.

        Raises:
            NotFinite: the loss of this iteration or of the one before is NaN or infinite.
        """
        self.check_finite(measures["loss"])
        self.book.iteration(self.done + 1, measures, self.schedulers[0].get_last_lr()[0])
        for scheduler in self.schedulers:
            scheduler.step()

    def evaluates(self) -> bool:
        """Whether an evaluation is due, at the start of an iteration.

        The last one follows the loop. It comes after the checkpoint: a run that dies while
        evaluating evaluates again.
        """
        return self.schedule.evaluates(self.done)

    def report(self, results: dict[str, Scores], measured: dict[str, float] | None = None) -> None:
        """Record an evaluation; best.pt is written where the result is the best so far.

        Args:
            results: scores by network, those of the method's result among them.
            measured: what else was measured, shares all of it.
        """
        best = self.book.evaluation(self.done, results[self.result], measured or {})
        if best and distributed.is_main():
            content = checkpoint.header(self.done, self.args, self.networks, self.result)
            checkpoint.write(content, self.checkpoint.with_name("best.pt"))

    def audit(self, network: nn.Module) -> dict[str, float]:
        """How good the network's labels of unlabelled images are, where their masks are at hand.

        Some of them are kept for figures/pseudo_labels.png.

        Returns:
            {"pseudo_accuracy": share of right pixels}, or {}. The masks are never trained on.
        """
        if not self.args.eval_only:
            figures.keep_pseudo_labels(network, self.done, self.data, self.args)
        return pseudo_accuracy(network, self.data, self.args)

    def finish(self, results: dict[str, Scores], measured: dict[str, float] | None = None) -> None:
        """Record the last evaluation; print the table, draw the figures, print the last line."""
        if not self.args.eval_only:
            self.report(results, measured)
        if distributed.is_main():
            figures.pseudo_label_strip(self.data, self.args)
        self.book.finish(results, self.result, self.networks[self.result])

    # --------------------------------------------------------------------------------------- safety

    def save(self) -> None:
        """Write last.pt; collective."""
        self.settle()
        content = checkpoint.header(self.done, self.args, self.networks, self.result)
        checkpoint.save(self.checkpoint, content, self.states)

    def signal(self) -> int | None:
        """The signal to stop for; all processes agree, and ask each other now and then only."""
        if not distributed.together():
            return runtime.signal_arrived()
        self.polls += 1
        return None if self.polls % POLL_EVERY else runtime.signal_anywhere(self.device)

    def check_finite(self, loss: Tensor) -> None:
        """Stop if the loss is NaN or infinite.

        On CUDA the value is copied without waiting and looked at one iteration later, so that the
        check costs no synchronisation.
        """
        self.settle()
        ready = torch.cuda.Event() if loss.is_cuda else None
        value = loss.detach().to("cpu", non_blocking=loss.is_cuda)
        if ready:
            ready.record()
        self.pending = (ready, value, self.done + 1, self.names)
        if ready is None:
            self.settle()

    def settle(self) -> None:
        """Look at the last loss that was not looked at yet."""
        if self.pending is None:
            return
        ready, value, iteration, names = self.pending
        self.pending = None
        if ready:
            ready.synchronize()
        if not torch.isfinite(value):
            shown = ", ".join(names)
            raise runtime.NotFinite(
                f"the loss is {value.item()} at iteration {iteration}; its images: {shown}"
            )


def place(network: DeepLabV3Plus, args: argparse.Namespace, device: torch.device) -> DeepLabV3Plus:
    """Move a network to the device.

    On CUDA its memory format is channels_last; with several processes its BatchNorm is that of all.
    Its forward pass computes in the precision of `--amp`.
    """
    network.amp = AMP[args.amp]
    if distributed.together():
        network = sync_batch_norm.convert(network)
    if device.type == "cuda":
        network = network.to(memory_format=torch.channels_last)
    return network.to(device)


def to_device(batch: dict, device: torch.device) -> dict:
    """A batch with its tensors on the device; on CUDA the copy runs beside the computation."""
    cuda = device.type == "cuda"
    return {
        key: value.to(device, non_blocking=cuda) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def sgd(networks: Sequence[DeepLabV3Plus], args: argparse.Namespace) -> torch.optim.SGD:
    """SGD with momentum 0.9 over the networks that learn; backbones and heads have their rates."""
    groups = [
        group
        for network in networks
        for group in parameter_groups(
            network, args.lr, args.head_lr_mult, args.weight_decay, args.decay_norm
        )
    ]
    return torch.optim.SGD(groups, lr=args.lr, momentum=0.9)
