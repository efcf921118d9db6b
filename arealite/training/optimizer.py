"""AdamW and its learning rate, which is a pure function of the step."""

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from arealite.training.fsdp import FSDPConfig


def lr_at(step: int, cfg: "FSDPConfig") -> float:
    """Learning rate of the step'th call of `step`, counted from 0.

    Rises from lr / warmup_steps at step 0 to lr at step warmup_steps - 1, then stays (constant),
    or falls on a line or half a cosine towards lr * min_lr_ratio at step total_steps.
    """
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant" or cfg.total_steps is None:
        return cfg.lr
    progress = min(1.0, (step - cfg.warmup_steps) / (cfg.total_steps - cfg.warmup_steps))
    share = 1 - progress if cfg.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * share)


def make_optimizer(module: torch.nn.Module, cfg: "FSDPConfig") -> torch.optim.AdamW:
    """AdamW over the module's parameters; weight decay leaves out biases and norms."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": cfg.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    # Fused: one pass per weight. Loops of small operations are slow where cores are shared.
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=cfg.lr,
        betas=cfg.betas,
        eps=cfg.eps,
        fused=True,
    )
    # AdamW would make these on its first step; a checkpoint from before it must have them too.
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def move_states(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Bring what the optimizer keeps of each parameter to a device, shard by shard."""
    for state in optimizer.state.values():
        for name, value in state.items():
            state[name] = value.to(device)
