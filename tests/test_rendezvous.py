"""Processes that torchrun starts again find each other, and not what the dead ones have left."""

import argparse
import os
import threading
import time

import torch.distributed as dist
import torch.multiprocessing as mp

from common import runtime
from common.rendezvous import agree_on_token


def meet_in_threads(store: dist.Store, world: int, late: float = 0.0) -> list[str]:
    """The tokens of `world` processes; those after the first appear `late` seconds after it."""
    tokens = [""] * world

    def process(rank: int) -> None:
        time.sleep(late if rank else 0)
        tokens[rank] = agree_on_token(store, rank, world)

    threads = [threading.Thread(target=process, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return tokens


def test_every_attempt_has_a_token_of_its_own():
    store = dist.HashStore()
    first = meet_in_threads(store, 3)
    assert first[0] and len(set(first)) == 1
    second = meet_in_threads(
        store, 3, late=0.1
    )  # process 0 reads the questions of the first attempt
    assert second[0] and len(set(second)) == 1 and second[0] != first[0]


def test_a_process_that_died_while_it_asked_is_not_taken_for_its_successor():
    store = dist.HashStore()
    store.set("question/1", "the name of the dead")
    tokens = meet_in_threads(store, 2, late=0.1)
    assert tokens[0] and tokens[0] == tokens[1]


def restarted(rank: int, port: int, folder: str) -> None:
    failures = "1" if rank == 1 else "0"  # only the machine of process 1 counts the failure
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RESTART_COUNT=failures,
        RANK=str(rank), WORLD_SIZE="2",
    )  # fmt: skip
    args = argparse.Namespace(
        device="cpu", batch_size=2, eval_only=False, deterministic=False, seed=0, amp="off",
        compile=False, output_dir=folder, resume=False, kernels="auto",
    )  # fmt: skip
    runtime.start(args)
    assert args.resume
    dist.destroy_process_group()


def test_all_machines_resume_where_one_had_the_failure(tmp_path):
    (tmp_path / "args.json").write_text("{}")
    port = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port  # a free one
    mp.spawn(restarted, (port, str(tmp_path)), nprocs=2)
