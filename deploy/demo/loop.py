"""The training loop that base and adapters share: a time budget, a cosine, and the best weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from corpus import TokenStream
from torch import nn

_WARMUP = 0.03  # share of the budget
_FINAL_LR = 0.05  # of the peak
_CLIP_NORM = 1.0
_EVALUATIONS = 8  # over the whole budget
_LOG_LINES = 24


@dataclass(frozen=True)
class Budget:
    """When training ends: at whichever limit comes first.

    Attributes:
        seconds: wall clock.
        tokens: training tokens seen.
    """

    seconds: float
    tokens: int

    def progress(self, elapsed_s: float, tokens: int) -> float:
        return max(elapsed_s / self.seconds, tokens / self.tokens)


@dataclass(frozen=True)
class Recipe:
    """How a training run is done: `batch` sequences of `length` tokens a step."""

    lr: float
    weight_decay: float
    batch: int
    length: int
    val_tokens: int


class MasterAdamW:
    """AdamW on fp32 copies of the parameters, which may themselves be bf16.

    The model then computes in bf16 throughout, and what is evaluated during training is exactly
    what is saved. Copies of fp32 parameters cost a little memory and change nothing.
    """

    def __init__(self, params: list[nn.Parameter], weight_decay: float) -> None:
        self._params = params
        self._masters = [p.detach().float().clone() for p in params]
        matrices = [m for m in self._masters if m.dim() > 1]
        vectors = [m for m in self._masters if m.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self._adam = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=0.0, betas=(0.9, 0.95)
        )

    def step(self, lr: float) -> torch.Tensor:
        """Applies the parameters' gradients and clears them.

        Returns:
            Their norm before clipping, fp32 [].
        """
        for master, param in zip(self._masters, self._params, strict=True):
            master.grad = None if param.grad is None else param.grad.float()
            param.grad = None
        norm = nn.utils.clip_grad_norm_(self._masters, _CLIP_NORM)
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        with torch.no_grad():
            torch._foreach_copy_(self._params, self._masters)
        return norm


def train(
    model: nn.Module,
    name: str,
    stream: TokenStream,
    val: TokenStream,
    recipe: Recipe,
    budget: Budget,
    seed: int,
    loss_of: Callable[[nn.Module, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> dict[str, float]:
    """Trains what requires a gradient, and leaves the weights that were best on `val`.

    Args:
        model: a causal language model of transformers, possibly wrapped by PEFT.
        name: prefix of the lines that are printed.
        loss_of: from the model and int64 [batch, length] tokens: the loss to minimise, and the
            language modelling part of it to print.

    Returns:
        steps, tokens, seconds, val_loss (nats per token) and train_loss (last printed).
    """
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = MasterAdamW(params, recipe.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    best_loss, best = math.inf, [p.detach().clone() for p in params]
    steps = tokens = 0
    next_log = next_val = 0.0
    lm_loss = torch.tensor(math.nan)
    start = time.monotonic()
    model.train()
    while (progress := budget.progress(time.monotonic() - start, tokens)) < 1.0:
        batch = stream.sample(recipe.batch, recipe.length, generator)
        loss, lm_loss = loss_of(model, batch)
        loss.backward()
        lr = recipe.lr * _schedule(progress)
        norm = optimizer.step(lr)
        steps += 1
        tokens += batch.numel()
        if progress >= next_log:
            next_log = progress + 1 / _LOG_LINES
            elapsed = time.monotonic() - start
            print(
                f"{name}: {elapsed:6.1f} s {progress:4.0%} step {steps:5} loss {lm_loss.item():.3f}"
                f" norm {norm.item():.2f} lr {lr:.1e} {tokens / elapsed:9,.0f} tokens/s",
                flush=True,
            )
        if progress >= next_val + 1 / _EVALUATIONS:
            next_val = progress
            best_loss = _keep_best(model, name, val, recipe, params, best, best_loss)
    best_loss = _keep_best(model, name, val, recipe, params, best, best_loss)
    with torch.no_grad():
        torch._foreach_copy_(params, best)
    return {
        "steps": steps,
        "tokens": tokens,
        "seconds": round(time.monotonic() - start, 1),
        "train_loss": lm_loss.item(),
        "val_loss": best_loss,
    }


def _schedule(progress: float) -> float:
    """Linear warm-up, then a cosine down to `_FINAL_LR`; relative to the peak."""
    if progress < _WARMUP:
        return max(progress, 1e-3) / _WARMUP
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - _WARMUP) / (1 - _WARMUP)))
    return _FINAL_LR + (1 - _FINAL_LR) * cosine


def _keep_best(
    model: nn.Module,
    name: str,
    val: TokenStream,
    recipe: Recipe,
    params: list[nn.Parameter],
    best: list[torch.Tensor],
    best_loss: float,
) -> float:
    loss = mean_loss(model, val, recipe.batch, recipe.length, recipe.val_tokens)
    model.train()
    print(f"{name}: val loss {loss:.3f}{' (best so far)' if loss < best_loss else ''}", flush=True)
    if loss < best_loss:
        torch._foreach_copy_(best, [p.detach() for p in params])
    return min(loss, best_loss)


@torch.no_grad()
def mean_loss(
    model: nn.Module, stream: TokenStream, batch: int, length: int, max_tokens: int
) -> float:
    """Mean next-token loss over consecutive windows, in nats per token."""
    model.eval()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for tokens in stream.windows(batch, length, max_tokens):
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        targets = tokens[:, 1:]
        total += (
            nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            .double()
            .cpu()
        )
        count += targets.numel()
    return (total / count).item()
