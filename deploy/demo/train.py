"""Trains the demo: a small MoE base and four tenants' adapters, checked and measured.

    python deploy/demo/train.py --data .demo_data --out .demo_model

Writes OUT/model (Hugging Face layout, bf16), OUT/adapters/<name> (PEFT layout, bf16),
OUT/demo_tenants.json, OUT/perplexity.{json,md}, OUT/samples.md and OUT/training.json. Exits with 1
when a published adapter doesn't read back as trained.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from adapters import check_reload, publish, train_adapter
from base import load_base, pick_experts_implementation, save_base, train_base
from corpus import TokenStream, load_manifest
from loop import Budget, Recipe
from report import markdown_table, perplexities, write_into_readme
from samples import as_markdown, sample
from tenants import ADAPTERS, BASE_NAME

SEED = 2026


@dataclass(frozen=True)
class _Plan:
    """Recipes and limits of one run of this script.

    Attributes:
        base_seconds, base_epochs: the base trains until either is spent.
        adapter_seconds: limit of each adapter, beside its own `AdapterSpec.epochs`.
        eval_tokens: held-out tokens that a style's perplexity is taken on, at most.
        max_tokens: most training tokens of any model.
    """

    base: Recipe
    adapter: Recipe
    base_seconds: float
    base_epochs: float
    adapter_seconds: float
    eval_tokens: int
    max_tokens: int | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> _Plan:
        return cls(
            base=Recipe(lr=2e-3, weight_decay=0.1, batch=128, length=512, val_tokens=500_000),
            adapter=Recipe(lr=2e-3, weight_decay=0.0, batch=32, length=512, val_tokens=100_000),
            base_seconds=60.0 * args.minutes,
            base_epochs=args.epochs,
            adapter_seconds=args.adapter_seconds,
            eval_tokens=160_000,
        )

    def tokens(self, stream: TokenStream, epochs: float) -> int:
        """Training tokens in so many passes over a stream."""
        wanted = int(epochs * len(stream.tokens))
        return wanted if self.max_tokens is None else min(wanted, self.max_tokens)


_SMOKE_RECIPE = Recipe(lr=2e-3, weight_decay=0.1, batch=4, length=128, val_tokens=2_048)
_SMOKE_PLAN = _Plan(
    base=_SMOKE_RECIPE,
    adapter=replace(_SMOKE_RECIPE, weight_decay=0.0),
    base_seconds=40.0,
    base_epochs=1.0,
    adapter_seconds=8.0,
    eval_tokens=2_048,
    max_tokens=100 * 4 * 128,
)


def main() -> int:
    args = _parse_args()
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high")
    began = time.monotonic()
    model_folder = args.out / "model"
    plan = _SMOKE_PLAN if args.smoke else _Plan.of(args)

    def load(name: str) -> TokenStream:
        return TokenStream.load(args.data, name, device)

    manifest = load_manifest(args.data)
    styles = [*manifest["base_styles"], *manifest["tenant_styles"]]
    heldout = {style: load(f"{style}.heldout") for style in styles}
    log: dict[str, dict[str, float]] = {}

    if not (args.reuse_base and (model_folder / "model.safetensors").is_file()):
        stream = load("base.train")
        budget = Budget(plan.base_seconds, plan.tokens(stream, plan.base_epochs))
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model, log["base"] = train_base(
            stream, load("base.val"), plan.base, budget, dtype, device, SEED
        )
        save_base(model, args.data / "tokenizer", model_folder)
        del model, stream
    base = load_base(model_folder, device)
    pick_experts_implementation(base, heldout[styles[0]], plan.adapter, SEED)
    experts = base.config._experts_implementation
    shape = (plan.adapter.batch, plan.adapter.length, plan.eval_tokens)
    results = {"base": perplexities(base, heldout, *shape)}
    print(f"base perplexity: {_row(results['base'])}", flush=True)

    prompts = [f"user: {spec.chat}" for spec in ADAPTERS]
    shown = as_markdown("base", prompts, sample(base, model_folder, prompts))
    del base

    problems: list[str] = []
    for spec in ADAPTERS:
        stream, val = load(f"{spec.name}.train"), load(f"{spec.name}.val")
        budget = Budget(plan.adapter_seconds, plan.tokens(stream, spec.epochs))
        model, log[spec.name] = train_adapter(
            spec, model_folder, experts, stream, val, plan.adapter, budget, device, SEED
        )
        folder = args.out / "adapters" / spec.name
        problems += publish(spec, model, folder)
        problems += check_reload(spec, model, model_folder, folder, heldout[spec.name])
        results[spec.name] = perplexities(model, heldout, *shape)
        print(f"{spec.name} perplexity: {_row(results[spec.name])}", flush=True)

        prompts = [f"user: {spec.chat}", spec.completion]
        shown += "\n" + as_markdown(spec.name, prompts, sample(model, model_folder, prompts))
        del model

    table = markdown_table(results, own={spec.name: spec.name for spec in ADAPTERS})
    _write_json(args.out / "perplexity.json", results)
    _write_json(args.out / "training.json", log)
    _write_json(args.out / "demo_tenants.json", tenants_document())
    (args.out / "perplexity.md").write_text(table + "\n")
    (args.out / "samples.md").write_text(shown)
    if args.write_readme is not None:
        write_into_readme(args.write_readme, table)
    print(f"{shown}\n{table}")
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
    parser.add_argument("--epochs", type=float, default=16.0, help="the base's, at most")
    parser.add_argument("--adapter-seconds", type=float, default=35.0, help="limit of each adapter")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, on a CPU")
    parser.add_argument("--reuse-base", action="store_true", help="keep OUT/model if it is there")
    parser.add_argument("--write-readme", type=Path, help="README.md to put the table into")
    return parser.parse_args()


def _row(row: dict[str, float]) -> str:
    return ", ".join(f"{style} {value:.1f}" for style, value in row.items())


def _write_json(path: Path, document: dict) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
