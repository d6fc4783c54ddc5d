"""Short texts from a trained model, to look at what perplexity doesn't show."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel

_NEW_TOKENS = 100


def sample(model: PreTrainedModel | PeftModel, tokenizer: Path, prompts: list[str]) -> list[str]:
    """Samples one continuation a prompt, at the settings of generation_config.json.

    Args:
        model: an adapted model is merged here, which makes generation fast and ends its training.
        tokenizer: OUT/model.
        prompts: a prompt that begins with "user: " becomes a chat; others are continued.
    """
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    tok = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    texts = []
    for prompt in prompts:
        text = prompt
        if prompt.startswith("user: "):
            turns = [{"role": "user", "content": prompt.removeprefix("user: ")}]
            text = tok.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tok(text, return_tensors="pt").to(model.device)
        out = model.generate(
            input_ids=ids["input_ids"],
            attention_mask=ids["attention_mask"],
            max_new_tokens=_NEW_TOKENS,
        )
        texts.append(tok.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def as_markdown(name: str, prompts: list[str], texts: list[str]) -> str:
    """One quoted block a prompt, under the model's name."""
    blocks = [f"## {name}"]
    for prompt, text in zip(prompts, texts, strict=True):
        blocks.append(f"```text\n[{prompt.rstrip()}]\n{text.strip()}\n```")
    return "\n\n".join(blocks) + "\n"
