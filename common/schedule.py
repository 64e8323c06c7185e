"""How long a run is, and after which iterations it evaluates and saves."""

import argparse


def poly(done: int, total: int) -> float:
    """The poly learning rate's factor, (1 - done/total)^0.9.

    Source: Liu et al., ParseNet, arXiv:1506.04579; Chen et al., DeepLab, arXiv:1606.00915.
    """
    return max(0.0, 1 - done / total) ** 0.9


class Schedule:
    """The iterations of a run.

    Args:
        args: `max_iters` or `epochs`; `eval_iters` or `eval_interval` (epochs); `save_interval`;
            `batch_size`.
        images: images that an epoch passes over.
        processes: how many share a batch, each with `batch_size` images.
        times: how many times as many iterations as `max_iters` says. Epochs are as long as their
            list, so they are not multiplied.
    """

    def __init__(self, args: argparse.Namespace, images: int, processes: int, times: float = 1):
        self.args = args
        self.per_epoch = max(1, images // (args.batch_size * processes))
        if args.max_iters:
            self.total = max(1, round(times * args.max_iters))
        else:
            self.total = args.epochs * self.per_epoch
        self.save_every = args.save_interval

    def restore(self, total: int, per_epoch: int) -> None:
        """Take the lengths with which a resumed run began, whatever images are gone since."""
        self.total, self.per_epoch = total, per_epoch

    @property
    def eval_every(self) -> int:
        """Iterations from one evaluation to the next."""
        return self.args.eval_iters or self.args.eval_interval * self.per_epoch

    def evaluates(self, done: int) -> bool:
        """Whether an evaluation follows iteration `done`; one always follows the last."""
        return done > 0 and (done % self.eval_every == 0 or done == self.total)

    def saves(self, done: int) -> bool:
        """Whether a checkpoint follows iteration `done`; one always precedes an evaluation."""
        return done > 0 and (done % self.save_every == 0 or self.evaluates(done))

    def factor(self, done: int) -> float:
        """The learning rate's factor after `done` iterations."""
        return poly(done, self.total)

    def __str__(self) -> str:
        epochs = self.total / self.per_epoch
        return f"{self.total} iterations ({epochs:.4g} epochs of {self.per_epoch} iterations each)"
