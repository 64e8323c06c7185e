"""How the processes of one attempt find each other, also when torchrun has started them anew.

torchrun (`--max-restarts N`) starts all processes again when one has died. Its agent lives on, and
with it the store in which the processes leave the addresses at which they listen. The addresses of
the dead ones are still there: whoever reads one before its successor has overwritten it calls where
nobody answers. So each attempt meets under a prefix of its own, a token that nobody used before.
TORCHELASTIC_RESTART_COUNT cannot be that prefix: each machine counts its own failures only.
"""

import secrets
import time

import torch.distributed as dist

PATIENCE = 1800  # seconds; what PyTorch's gloo waits for the others, too


def fresh_store(rank: int, world: int) -> dist.Store:
    """The store of this attempt alone; collective.

    Raises:
        TimeoutError: the other processes did not appear.
    """
    store, _, _ = next(dist.rendezvous("env://", rank, world))
    token = agree_on_token(store, rank, world)
    return dist.PrefixStore(token, store)


def agree_on_token(store: dist.Store, rank: int, world: int) -> str:
    """A word that all processes of this attempt have, and no process of an earlier one had.

    Process 0 makes it up. Every other process asks under a random name of its own, so that it
    cannot mistake an old answer for its own. Process 0 may read an old question first; it answers
    whatever it finds, until the process has thanked for this very token.

        process r                                     process 0
        question/r = name             ------>         reads question/r
        waits for answer/name         <------         answer/name = token
        thanks/token/r = ""           ------>         goes on
    """
    if rank > 0:
        name = secrets.token_hex(8)
        store.set(f"question/{rank}", name)
        token = store.get(f"answer/{name}").decode()
        store.set(f"thanks/{token}/{rank}", "")
        return token

    token = secrets.token_hex(8)
    deadline = time.monotonic() + PATIENCE
    for other in range(1, world):
        while not store.check([f"thanks/{token}/{other}"]):
            if store.check([f"question/{other}"]):
                name = store.get(f"question/{other}").decode()
                store.set(f"answer/{name}", token)
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {other} of {world} did not appear")
            time.sleep(0.01)
    return token
