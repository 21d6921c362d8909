"""Muon, an optimizer for matrices (Jordan et al. 2024): its steps are orthogonal matrices.

The step of SGD with Nesterov momentum is replaced by the nearest orthogonal matrix, so all directions
of the matrix learn at the same rate. The algorithm is that of torch.optim.Muon with
`adjust_lr_fn="match_rms_adamw"`. PyTorch's version always computes in bfloat16, which many CPUs only
emulate: a training step of the bundled model then takes three times as long.
"""

import math

import torch
from torch import Tensor


def orthogonalize(x: Tensor) -> Tensor:
    """(rows, columns): five Newton-Schulz iterations towards the nearest orthogonal matrix. Most singular
    values end between 0.7 and 1.2; more precision does not help."""
    if len(x) > len(x.T):
        return orthogonalize(x.T).T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Muon with decoupled weight decay, for parameters with two dimensions. The scale of its steps is that
    of AdamW, so both can have the same learning rate."""

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                average = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalize(parameter.grad.lerp(average, group["momentum"]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(update, alpha=0.2 * math.sqrt(max(update.shape)) * group["lr"])
