"""Trains the demo: a small MoE base and four tenants' adapters, checked and measured.

    python deploy/demo/train.py --data .demo_data --out .demo_model

Writes OUT/model (Hugging Face layout, bf16), OUT/adapters/<name> (PEFT layout, bf16),
OUT/demo_tenants.json, OUT/perplexity.{json,md} and OUT/training.json. Exits with 1 when a published
adapter doesn't read back as trained.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from adapters import check_reload, publish, train_adapter
from base import load_base, pick_experts_implementation, save_base, train_base
from corpus import TokenStream, load_manifest
from loop import Budget, Recipe
from report import markdown_table, perplexities, write_into_readme
from tenants import ADAPTERS, BASE_NAME

ADAPTER_SECONDS = 35.0
BASE_EPOCHS = 14
EVAL_TOKENS = 160_000  # a style
SEED = 20_26

BASE_RECIPE = Recipe(
    lr=2e-3,
    weight_decay=0.1,
    batch=128,
    length=512,
    budget=Budget(seconds=300.0, tokens=0),
    val_tokens=500_000,
)
ADAPTER_RECIPE = Recipe(
    lr=2e-3,
    weight_decay=0.0,
    batch=32,
    length=512,
    budget=Budget(seconds=ADAPTER_SECONDS, tokens=0),
    val_tokens=100_000,
)


def main() -> int:
    args = _parse_args()
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high")
    began = time.monotonic()
    model_folder = args.out / "model"
    base_recipe, adapter_recipe, eval_tokens = _recipes(args)

    def load(name: str) -> TokenStream:
        return TokenStream.load(args.data, name, device)

    manifest = load_manifest(args.data)
    styles = [*manifest["base_styles"], *manifest["tenant_styles"]]
    heldout = {style: load(f"{style}.heldout") for style in styles}
    log: dict[str, dict[str, float]] = {}

    if not (args.reuse_base and (model_folder / "model.safetensors").is_file()):
        stream = load("base.train")
        recipe = _with_tokens(base_recipe, BASE_EPOCHS * len(stream.tokens), args.smoke)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model, log["base"] = train_base(stream, load("base.val"), recipe, dtype, device, SEED)
        save_base(model, args.data / "tokenizer", model_folder)
        del model, stream
    base = load_base(model_folder, device)
    pick_experts_implementation(base, heldout[styles[0]], adapter_recipe, SEED)
    experts = base.config._experts_implementation
    shape = (adapter_recipe.batch, adapter_recipe.length, eval_tokens)
    results = {"base": perplexities(base, heldout, *shape)}
    print(f"base perplexity: {_row(results['base'])}", flush=True)

    problems: list[str] = []
    for spec in ADAPTERS:
        stream, val = load(f"{spec.name}.train"), load(f"{spec.name}.val")
        recipe = _with_tokens(adapter_recipe, int(spec.epochs * len(stream.tokens)), args.smoke)
        model, log[spec.name] = train_adapter(
            spec, model_folder, experts, stream, val, recipe, device, SEED
        )
        folder = args.out / "adapters" / spec.name
        problems += publish(spec, model, folder)
        problems += check_reload(spec, model, model_folder, folder, heldout[spec.name])
        results[spec.name] = perplexities(model, heldout, *shape)
        print(f"{spec.name} perplexity: {_row(results[spec.name])}", flush=True)

    table = markdown_table(results, own={spec.name: spec.name for spec in ADAPTERS})
    _write_json(args.out / "perplexity.json", results)
    _write_json(args.out / "training.json", log)
    _write_json(args.out / "demo_tenants.json", tenants_document())
    (args.out / "perplexity.md").write_text(table + "\n")
    if args.write_readme is not None:
        write_into_readme(args.write_readme, table)
    print(table)
    print(f"done in {time.monotonic() - began:.0f} s; problems: {problems or 'none'}")
    return 1 if problems else 0


def tenants_document() -> dict:
    """Tenants with their adapters, folders relative to this document."""
    tenants: dict[str, list[dict]] = {}
    for spec in ADAPTERS:
        tenants.setdefault(spec.tenant, []).append(
            {
                "name": spec.name,
                "folder": f"adapters/{spec.name}",
                "style": spec.style,
                "format": spec.format,
                "samples": {"chat": spec.chat, "completion": spec.completion},
            }
        )
    return {
        "base": {"name": BASE_NAME, "folder": "model"},
        "tenants": [{"name": name, "adapters": adapters} for name, adapters in tenants.items()],
    }


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="what prepare_texts.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=5.0, help="limit of the base's training")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, on a CPU")
    parser.add_argument("--reuse-base", action="store_true", help="keep OUT/model if it is there")
    parser.add_argument("--write-readme", type=Path, help="README.md to put the table into")
    return parser.parse_args()


def _recipes(args: argparse.Namespace) -> tuple[Recipe, Recipe, int]:
    """Recipes of base and adapters, and tokens to evaluate a style on."""
    base = replace(BASE_RECIPE, budget=Budget(seconds=60.0 * args.minutes, tokens=0))
    if not args.smoke:
        return base, ADAPTER_RECIPE, EVAL_TOKENS
    small = {"batch": 4, "length": 128, "val_tokens": 2_048}
    base = replace(base, budget=Budget(seconds=40.0, tokens=0), **small)
    adapter = replace(ADAPTER_RECIPE, budget=Budget(seconds=8.0, tokens=0), **small)
    return base, adapter, 2_048


def _with_tokens(recipe: Recipe, tokens: int, smoke: bool) -> Recipe:
    """The recipe, limited to so many tokens; a smoke run keeps to 100 steps."""
    if smoke:
        tokens = min(tokens, 100 * recipe.batch * recipe.length)
    return replace(recipe, budget=Budget(recipe.budget.seconds, tokens))


def _row(row: dict[str, float]) -> str:
    return ", ".join(f"{style} {value:.1f}" for style, value in row.items())


def _write_json(path: Path, document: dict) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
