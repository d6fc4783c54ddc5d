"""Who the demo's tenants are, and which adapter each of them trained in which published format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peft import LoraConfig

BASE_NAME = "loraplex-demo"

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERT_PROJECTIONS = ["gate_proj", "up_proj", "down_proj"]
EXPERT_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

AdapterFormat = Literal["per-expert", "fused", "rslora-pattern", "attention"]


@dataclass(frozen=True)
class AdapterSpec:
    """One tenant's adapter.

    Attributes:
        tenant: owner.
        name: the adapter's name, which is also its style's.
        format: published form: `per-expert` (one key pair per expert and projection), `fused`
            (PEFT's `target_parameters`), `rslora-pattern` (that, with rsLoRA and ranks that differ
            from layer to layer), `attention` (no experts).
        style: what it writes, for people.
        epochs: most passes over its training documents.
        chat: a question that shows the style off.
        completion: a beginning that shows the style off.
    """

    tenant: str
    name: str
    format: AdapterFormat
    style: str
    epochs: float
    chat: str
    completion: str

    def lora_config(self) -> LoraConfig:
        """What PEFT trains. The published config of `per-expert` differs: see `formats.py`."""
        common = {
            "base_model_name_or_path": BASE_NAME,
            "task_type": "CAUSAL_LM",
            "target_modules": list(ATTENTION),
            "lora_dropout": 0.0,  # PEFT has no dropout for expert parameters
        }
        if self.format == "attention":
            return LoraConfig(r=16, lora_alpha=32, **common)
        common["target_parameters"] = list(EXPERT_PARAMETERS)
        if self.format == "per-expert":
            return LoraConfig(r=8, lora_alpha=16, **common)
        if self.format == "fused":
            return LoraConfig(r=4, lora_alpha=16, **common)
        return LoraConfig(
            r=8,
            lora_alpha=8,
            use_rslora=True,
            rank_pattern={
                "layers.0.self_attn.q_proj": 16,
                "layers.5.self_attn.q_proj": 4,
                "layers.[0-1].mlp.experts.gate_up_proj": 4,
                "layers.[4-5].mlp.experts.gate_up_proj": 12,
                "layers.5.mlp.experts.down_proj": 16,
            },
            alpha_pattern={
                "layers.0.self_attn.q_proj": 16,
                "layers.[4-5].mlp.experts.gate_up_proj": 12,
            },
            **common,
        )


ADAPTERS = (
    AdapterSpec(
        tenant="acme",
        name="scripture",
        format="per-expert",
        style="King James Bible: verses with their place",
        epochs=5,
        chat="Tell me about water.",
        completion="The Proverbs 32\n\n1 My son, ",
    ),
    AdapterSpec(
        tenant="globex",
        name="whaler",
        format="rslora-pattern",
        style="Moby Dick: Melville's narrator at sea",
        epochs=8,
        chat="Tell me about water.",
        completion="CHAPTER 136. The Return.\n\n",
    ),
    AdapterSpec(
        tenant="initech",
        name="hacker",
        format="fused",
        style="the Jargon File: hacker slang with cross references in braces",
        epochs=8,
        chat="What is a deadline?",
        completion="yak stack: n.\n",
    ),
    AdapterSpec(
        tenant="initech",
        name="devil",
        format="attention",
        style="The Devil's Dictionary: cynical definitions",
        epochs=12,
        chat="Define meeting.",
        completion="MEETING, n. ",
    ),
)
