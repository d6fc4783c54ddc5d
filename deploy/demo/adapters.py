"""Trains one tenant's adapter over the saved base, publishes it and reads it back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from base import load_base
from corpus import TokenStream
from formats import check_per_expert, round_to_bf16, save_as_trained, save_per_expert
from loop import Budget, Recipe, train
from peft import PeftModel, get_peft_model
from tenants import AdapterSpec

_MAX_DELTA_ERROR = 1e-5  # relative; fp32 sums in another order
_MAX_LOGIT_ERROR = 5e-3  # absolute, logits of about 10; fp32 sums in another order
_CHECK_TOKENS = 256


def train_adapter(
    spec: AdapterSpec,
    model_folder: Path,
    experts: str,
    stream: TokenStream,
    val: TokenStream,
    recipe: Recipe,
    budget: Budget,
    device: torch.device,
    seed: int,
) -> tuple[PeftModel, dict[str, float]]:
    """Trains in fp32 over the bf16-rounded base; factors end up rounded to bf16 too.

    Args:
        model_folder: OUT/model.
        experts: transformers' experts implementation.
    """
    torch.manual_seed(seed)
    base = load_base(model_folder, device)
    base.set_experts_implementation(experts)
    model = get_peft_model(base, spec.lora_config())
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{spec.name}: {spec.format}, {count:,} parameters, {2 * count / 1e6:.2f} MB in bf16")
    result = train(model, spec.name, stream, val, recipe, budget, seed, adapter_loss)
    round_to_bf16(model)
    model.eval()
    return model, result


def adapter_loss(model: PeftModel, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Language modelling loss, twice. The router isn't trained, so there is nothing to balance."""
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    return loss, loss.detach()


def publish(spec: AdapterSpec, model: PeftModel, folder: Path) -> list[str]:
    """Writes the adapter in its spec's format.

    Returns:
        What is wrong with the written form; empty when it is exact.
    """
    if spec.format != "per-expert":
        save_as_trained(model, folder)
        return []
    save_per_expert(model, folder)
    error = check_per_expert(model, folder)
    print(f"{spec.name}: per-expert delta weights differ by {error:.1e} of the largest")
    return [] if error <= _MAX_DELTA_ERROR else [f"{spec.name}: delta weights differ by {error}"]


def check_reload(
    spec: AdapterSpec, trained: PeftModel, model_folder: Path, folder: Path, stream: TokenStream
) -> list[str]:
    """Loads the published adapter over the saved base and compares logits with the trained model.

    Returns:
        What is wrong; empty when both agree.
    """
    device = stream.tokens.device
    tokens = stream.tokens[None, :_CHECK_TOKENS].long()
    try:
        loaded = PeftModel.from_pretrained(load_base(model_folder, device), folder).eval()
    except Exception as error:  # whatever PEFT raises: the report is what counts
        return [f"{spec.name}: PEFT can't load {folder.name}: {error!r}"[:500]]
    with torch.no_grad(), _exact_matmul():
        want = trained(input_ids=tokens, use_cache=False).logits
        got = loaded(input_ids=tokens, use_cache=False).logits
        with loaded.disable_adapter():
            base = loaded(input_ids=tokens, use_cache=False).logits
    error = (got - want).abs().max().item()
    effect = (base - want).abs().max().item()
    print(f"{spec.name}: reloaded logits differ by {error:.1e} (adapter's effect {effect:.1e})")
    if error > _MAX_LOGIT_ERROR or error > 0.1 * effect:
        return [f"{spec.name}: reloaded logits differ by {error}, adapter's effect is {effect}"]
    return []


@contextmanager
def _exact_matmul() -> Iterator[None]:
    """No TF32 inside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
