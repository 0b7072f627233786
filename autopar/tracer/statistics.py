"""Running statistics that torch keeps out of the capture's sight.

* Batch norms with `momentum=None` average over all batches: torch divides by the counter as a
  Python number, so each step would be another program. Here they divide by the counter as a tensor.
* `aten::instance_norm` writes into the statistics although its schema does not say so, and the
  writes would be lost. Here they are operators of their own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm


def averages_all_batches(module: torch.nn.Module) -> bool:
    """Whether a batch norm in training keeps the mean of all batches' statistics."""
    return (
        isinstance(module, _BatchNorm)
        and type(module).forward is _BatchNorm.forward
        and module.momentum is None
        and module.training
        and module.running_mean is not None
        and module.num_batches_tracked is not None
    )


def cumulative_batch_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    """`_BatchNorm.forward` with `momentum=None`, for an x of [n, c, *].

    A momentum of 1 gives the batch's own statistics, in copies of the running ones.
    """
    module._check_input_dim(x)
    mean, var = module.running_mean.clone(), module.running_var.clone()
    result = F.batch_norm(x, mean, var, module.weight, module.bias, True, 1.0, module.eps)
    with torch.no_grad():
        module.num_batches_tracked.add_(1)
        share = 1.0 / module.num_batches_tracked.double()
        for running, batch in ((module.running_mean, mean), (module.running_var, var)):
            running.copy_(share * batch + (1.0 - share) * running)
    return result


def instance_norm(
    x: torch.Tensor,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """`F.instance_norm` for an x of [n, c, *]; running statistics are the means over n."""
    if running_mean is None or running_var is None or not use_input_stats:
        return F.instance_norm(
            x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    result = F.instance_norm(x, None, None, weight, bias, True, momentum, eps)
    with torch.no_grad():
        values = x.to(running_mean.dtype).flatten(2)
        for running, own in ((running_mean, values.mean(2)), (running_var, values.var(2))):
            running.copy_((momentum * own + (1.0 - momentum) * running).mean(0))
    return result
