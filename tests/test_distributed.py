"""What two processes tell each other, what one gets alone, and networks that several train."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from common import distributed
from common.deeplabv3plus import DeepLabV3Plus
from common.run import Run, place
from common.sync_batch_norm import SyncBatchNorm

CPU = torch.device("cpu")
WORLD = 2
IMAGES = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
COUNTED = torch.tensor([True, False, True, True])  # one of the first process, two of the other


def parallel(network: nn.Module) -> nn.Module:
    """`Run.parallel` without a whole run around it."""
    return Run.parallel(SimpleNamespace(device=CPU, args=SimpleNamespace(compile=False)), network)


def line() -> nn.Linear:
    """A layer, the same on every process."""
    torch.manual_seed(1)
    return nn.Linear(3, 1)


def mean_loss(network: nn.Module, images: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Mean over the counted pixels, of all processes, of the squared output."""
    squares = network(images)[:, 0].square()
    return distributed.global_mean((squares * counted).sum(), counted.sum())


def answers(rank: int) -> dict:
    """What the functions say to process `rank`, which brings numbers of its own."""
    whole = torch.arange(6.0).view(2, 3) + 10 * rank
    mine = slice(2 * rank, 2 * rank + 2)
    network = line()
    trained = parallel(network)  # it must outlive the backward pass, in which it averages
    loss = mean_loss(trained, IMAGES[mine], COUNTED[mine])
    loss.backward()
    unchanged = whole.clone()
    found = {
        "who": (distributed.rank(), distributed.world_size(), distributed.is_main()),
        "add_up": distributed.add_up(whole),
        "left_alone": torch.equal(whole, unchanged),
        "highest": distributed.highest(15.0 if rank == 1 else 0, CPU),
        "collect": distributed.collect(whole.T),  # a tensor that is not contiguous
        "gather": distributed.gather({"rank": rank, "name": "ab"[rank]}),
        "merge": distributed.merge({f"of {rank}": rank, "both": rank}),
        "nothing": distributed.global_mean(loss.detach() * 0, torch.tensor(0)),
        "loss": loss.detach(),
        "gradient": network.weight.grad,
    }
    distributed.barrier()
    return found


def sharing() -> dict:
    """Whether what a network is trained through has the network's own parameters and statistics."""
    torch.manual_seed(0)
    network = DeepLabV3Plus("tiny", 4, output_stride=8)
    network = place(network, SimpleNamespace(amp="off"), CPU)
    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    trained = parallel(network)
    own = [id(part) for part in (*network.parameters(), *network.buffers())]
    same = own == [id(part) for part in (*trained.parameters(), *trained.buffers())]
    trained(torch.randn(2, 3, 32, 32)).mean().backward()
    return {
        "wrapped": isinstance(trained, nn.parallel.DistributedDataParallel),
        "unwrapped": getattr(trained, "module", trained) is network,
        "shared": same and all(p.grad is not None for p in network.parameters()),
        "norms": all(type(norm) is SyncBatchNorm for norm in norms) and len(norms) > 0,
    }


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=WORLD)
    found = answers(rank) | sharing()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The answers of two processes."""
    folder: Path = tmp_path_factory.mktemp("processes")
    mp.spawn(worker, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def test_two_processes_know_who_they_are_and_what_the_other_has(told: list[dict]):
    parts = [torch.arange(6.0).view(2, 3) + 10 * rank for rank in range(WORLD)]
    assert [found["who"] for found in told] == [(0, 2, True), (1, 2, False)]
    for found in told:
        assert torch.equal(found["add_up"], parts[0] + parts[1]) and found["left_alone"]
        assert found["highest"] == 15
        assert all(torch.equal(got, part.T) for got, part in zip(found["collect"], parts))
        assert found["gather"] == [{"rank": 0, "name": "a"}, {"rank": 1, "name": "b"}]
        assert found["merge"] == {"of 0": 0, "of 1": 1, "both": 1}
        assert found["nothing"] == 0


def test_a_mean_over_processes_has_the_gradient_of_the_whole_batch(told: list[dict]):
    """The processes have one and two pixels that count: the mean of their means would differ."""
    network = line()
    whole = network(IMAGES)[:, 0].square()[COUNTED].mean()
    whole.backward()
    torch.testing.assert_close(sum(found["loss"] for found in told) / WORLD, whole.detach())
    for found in told:
        torch.testing.assert_close(found["gradient"], network.weight.grad)


def test_a_network_that_several_train_shares_its_parameters(told: list[dict]):
    for found in told:
        assert found["wrapped"] and found["unwrapped"] and found["shared"] and found["norms"]


def test_alone_each_function_is_the_obvious_thing():
    value = torch.tensor([1.0, 2.0])
    assert not distributed.together()
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    added = distributed.add_up(value)
    assert torch.equal(added, value) and added is not value
    assert distributed.highest(3, CPU) == 3
    assert distributed.collect(value) == [value]
    assert distributed.gather("mine") == ["mine"] and distributed.merge({1: 2}) == {1: 2}
    total = torch.tensor(6.0, requires_grad=True)
    mean = distributed.global_mean(total, torch.tensor(4))
    mean.backward()
    assert mean.item() == 1.5 and total.grad == 0.25
    assert distributed.global_mean(torch.tensor(0.0), torch.tensor(0)) == 0
    distributed.barrier()
