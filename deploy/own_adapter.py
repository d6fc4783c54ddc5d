"""Makes a LoRA adapter for the demo's base model, in the files that PEFT's save_pretrained writes.

    python deploy/own_adapter.py FOLDER

Its values are random: it makes the model talk nonsense, which is easy to tell from the base model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

MODEL = Path(__file__).resolve().parent / "demo/model"
RANK = 4


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    model = json.loads((MODEL / "config.json").read_text())
    hidden = model["hidden_size"]
    heads = model["num_attention_heads"]
    head_dim = model.get("head_dim") or hidden // heads
    rng = np.random.default_rng()
    tensors = {}
    for layer in range(model["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.o_proj"
        a = rng.normal(size=(RANK, heads * head_dim)) / np.sqrt(heads * head_dim)
        b = rng.normal(size=(hidden, RANK))
        tensors[f"{name}.lora_A.weight"] = a.astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = b.astype(np.float32)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "loraplex-demo",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": ["o_proj"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, folder / "adapter_model.safetensors")
    print(f"wrote {folder}: rank {RANK} on o_proj of {len(tensors) // 2} layers")


if __name__ == "__main__":
    main()
