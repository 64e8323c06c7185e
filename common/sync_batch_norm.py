"""BatchNorm over the images of all processes: they compute what one would with the whole batch.

PyTorch's own nn.SyncBatchNorm runs on GPUs only, so that no test on a CPU can tell whether it is
right, and it lets every process have another number of elements, or none: to leave the empty ones
out it waits for the GPU three times a layer. Here all processes have the same shapes, always.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d whose batch is that of all processes: collective in train mode, local in eval.

    Shape: (N,C,H,W) -> the same; N, H and W are the same on all processes.
    """

    def forward(self, features: Tensor) -> Tensor:
        if not self.training:
            return super().forward(features)
        mean, var, count = batch_statistics(features.detach())
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)  # the unbiased one
        return Normalise.apply(features, self.weight, self.bias, mean, var, count, self.eps)


def convert(network: nn.Module) -> nn.Module:
    """`network` with a SyncBatchNorm for every BatchNorm2d; before the optimiser is built."""
    for name, norm in list(network.named_modules()):
        if type(norm) is nn.BatchNorm2d:
            ours = SyncBatchNorm(norm.num_features, norm.eps, norm.momentum).to(norm.weight)
            ours.load_state_dict(norm.state_dict())
            network.set_submodule(name, ours.train(norm.training))
    return network


def batch_statistics(features: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance (C,) over all processes, and how many elements a channel has there.

    Of processes r = 1..R with equally many elements:
        mean = 1/R Σ mean_r,    var = 1/R Σ var_r + 1/R Σ (mean_r - mean)²
    """
    if not features.is_cuda:  # where PyTorch would round the statistics to the type of the features
        features = features.to(torch.promote_types(features.dtype, torch.float32))
    local = torch.stack(torch.batch_norm_update_stats(features, None, None, 0.0))  # (2,C)
    world = dist.get_world_size()
    everywhere = local.new_empty(2 * world, local.shape[1])
    dist.all_gather_into_tensor(everywhere, local)
    means, variances = everywhere[0::2], everywhere[1::2]  # (R,C) each
    between, mean = torch.var_mean(means, 0, correction=0)
    count = world * features.numel() // features.shape[1]
    return mean, variances.mean(0) + between, count


class Normalise(torch.autograd.Function):
    """y = w·x̂ + b with x̂ = (x - mean) / sqrt(var + eps); mean, var depend on x of all processes.

    With g = ∂L/∂y, and Σ over all M elements of a channel on all processes:
        ∂L/∂x = w / sqrt(var + eps) · (g - 1/M Σ g - x̂ · 1/M Σ g·x̂)
        ∂L/∂w = Σ g·x̂,  ∂L/∂b = Σ g   over this process alone: DDP adds the others'
    Source: the gradient of Ioffe and Szegedy, arXiv:1502.03167, section 3.
    """

    @staticmethod
    def forward(
        ctx,
        features: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        count: int,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(features, weight, mean, var)
        ctx.count, ctx.eps = count, eps
        return F.batch_norm(features, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, mean, var = ctx.saved_tensors
        last = features.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        gradient = gradient.contiguous(memory_format=layout)

        std = (var + ctx.eps).sqrt()
        wanted = [False, True, True]  # the gradients of weight and bias, not of the input
        _, for_weight, for_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, features, weight, None, None, mean, 1 / std, True, ctx.eps, wanted
        )
        sums = torch.stack([for_weight, for_bias])
        dist.all_reduce(sums)
        for_features = input_gradient(gradient, features, weight, mean, std, sums, ctx.count)
        return for_features, for_weight, for_bias, None, None, None, None


def input_gradient(
    gradient: Tensor,
    features: Tensor,
    weight: Tensor,
    mean: Tensor,
    std: Tensor,
    sums: Tensor,
    count: int,
) -> Tensor:
    """∂L/∂x of `Normalise`.

    Args:
        gradient: g, (N,C,H,W).
        features: x, (N,C,H,W).
        weight: w, (C,).
        mean: (C,).
        std: sqrt(var + eps), (C,).
        sums: Σ g·x̂ and Σ g over all processes, (2,C).
        count: M, the elements of a channel on all processes.

    Returns:
        (N,C,H,W) of the type of the features.
    """
    if features.is_cuda:  # one kernel, which wants Σ g·(x - mean)
        counts = torch.full((1,), count, dtype=torch.int32, device=features.device)
        return torch.batch_norm_backward_elemt(
            gradient, features, mean, 1 / std, weight, sums[1], sums[0] * std, counts
        )
    mean, std, weight, along, constant = (
        values.view(1, -1, 1, 1) for values in (mean, std, weight, *(sums / count))
    )
    normalised = (features - mean) / std
    return (weight / std * (gradient - constant - normalised * along)).to(features.dtype)
