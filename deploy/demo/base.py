"""The demo's base model: a small Qwen3-MoE, trained from scratch on the mixed corpus."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import torch
from chatml import END_OF_TEXT, IM_END, PAD, SPECIAL_TOKENS
from corpus import TokenStream
from loop import Budget, Recipe, train
from tokenizer import MAX_POSITIONS, VOCAB_SIZE
from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

ROUTER_AUX_LOSS = 0.01
_EXPERTS_IMPLEMENTATIONS = ("grouped_mm", "eager")
_PROBE_STEPS = 3


def base_config() -> Qwen3MoeConfig:
    """11.7 M parameters, of which about 4.6 M are active for a token."""
    return Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,  # of dense layers; there are none
        moe_intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        router_aux_loss_coef=ROUTER_AUX_LOSS,
        eos_token_id=SPECIAL_TOKENS.index(IM_END),
        pad_token_id=SPECIAL_TOKENS.index(PAD),
    )


def train_base(
    stream: TokenStream,
    val: TokenStream,
    recipe: Recipe,
    budget: Budget,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> tuple[Qwen3MoeForCausalLM, dict[str, float]]:
    """Builds and trains the base.

    Args:
        dtype: of weights and compute; the optimiser keeps fp32 copies.

    Returns:
        The model, and what `loop.train` says of the run.
    """
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(base_config()).to(device=device, dtype=dtype)
    count = sum(p.numel() for p in model.parameters())
    pick_experts_implementation(model, stream, recipe, seed)
    print(f"base: {count:,} parameters, experts by {model.config._experts_implementation}")
    return model, train(model, "base", stream, val, recipe, budget, seed, base_loss)


def base_loss(
    model: Qwen3MoeForCausalLM, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Language modelling loss with the load balancing loss, and without it."""
    out = model(input_ids=tokens, labels=tokens, output_router_logits=True, use_cache=False)
    return out.loss, out.loss.detach() - ROUTER_AUX_LOSS * out.aux_loss.detach()


def pick_experts_implementation(
    model: Qwen3MoeForCausalLM, stream: TokenStream, recipe: Recipe, seed: int
) -> None:
    """Sets the fastest experts implementation that runs here, forward and backward.

    Which ones exist for a device and dtype differs between versions of torch and transformers.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = stream.sample(recipe.batch, recipe.length, generator)
    timings: dict[str, float] = {}
    for name in _EXPERTS_IMPLEMENTATIONS:
        try:
            model.set_experts_implementation(name)
            for step in range(_PROBE_STEPS):
                if step == 1:  # the first step pays for set-up
                    _synchronize(tokens.device)
                    start = time.monotonic()
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
                if loss.requires_grad:
                    loss.backward()
            _synchronize(tokens.device)
            timings[name] = (time.monotonic() - start) / (_PROBE_STEPS - 1)
        except (RuntimeError, ValueError, KeyError) as error:
            print(f"experts by {name}: not here ({str(error).splitlines()[0][:120]})")
        model.zero_grad(set_to_none=True)
    if not timings:
        raise RuntimeError("no experts implementation of transformers runs on this machine")
    print("experts: " + ", ".join(f"{n} {s * 1e3:.0f} ms a step" for n, s in timings.items()))
    model.set_experts_implementation(min(timings, key=timings.__getitem__))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def save_base(model: Qwen3MoeForCausalLM, tokenizer: Path, folder: Path) -> None:
    """Writes the model in bf16 and Hugging Face's layout, with its tokenizer.

    Args:
        tokenizer: folder with tokenizer.json and tokenizer_config.json.
        folder: OUT/model; made when missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(
        eos_token_id=[SPECIAL_TOKENS.index(IM_END), SPECIAL_TOKENS.index(END_OF_TEXT)],
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    for path in tokenizer.iterdir():
        shutil.copy(path, folder / path.name)
    # Published checkpoints of this architecture name these two as transformers 4 did.
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text())
    config["rope_theta"] = model.config.rope_parameters["rope_theta"]
    config["num_experts"] = model.config.num_experts
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_base(folder: Path, device: torch.device) -> Qwen3MoeForCausalLM:
    """The saved weights (rounded to bf16), computing in fp32."""
    return Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
