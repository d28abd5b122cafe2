"""Optimizers, schedules of the learning rate, orthogonal initial weights."""

from __future__ import annotations

import math

import torch
from torch import nn

from seqkern.train.config import Training


def make_optimizer(model: nn.Module, config: Training) -> torch.optim.Optimizer:
    """Weight decay applies to matrices alone: on biases and norms it would only pull values towards 0."""
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in weights if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.lr, momentum=config.momentum)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, config.lr, betas=(0.9, config.beta2), fused=True)


def learning_rate_factor(schedule: str, warmup: int, step: int, progress: float) -> float:
    """By what the learning rate is multiplied at update `step` (from 0), `progress` of the way (0…1).

    Linear warm-up over `warmup` updates, from 1/warmup to 1; then 1 (constant, plateau), a half cosine from 1
    to 0 (Loshchilov and Hutter 2017, "SGDR"), or √(warmup / step) (Vaswani et al. 2017, "Attention is all you
    need", whose rate is d_model^-0.5 · min(step^-0.5, step · warmup^-1.5)).
    """
    warmup = max(warmup, 1)
    growing = min(1.0, (step + 1) / warmup)
    if schedule == "cosine":
        return growing * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    if schedule == "inverse-sqrt":
        return min(growing, math.sqrt(warmup / (step + 1)))
    return growing


@torch.no_grad()
def orthogonal_(model: nn.Module) -> nn.Module:
    """Gives each gate's recurrent matrix, in every recurrent layer and cell, an orthogonal value.

    The blocks of an SLSTM's heads and an IndRNN's vector are left as they are.

    Source: Saxe et al. 2014, "Exact solutions to the nonlinear dynamics of learning in deep linear networks"
    """
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if name.startswith("weight_hh") and weight.dim() == 2:
                for gate in weight.split(module.hidden_size):
                    nn.init.orthogonal_(gate)
    return model
