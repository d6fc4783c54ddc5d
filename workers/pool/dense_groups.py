"""The dense projections of a layer that adapters may target, as the pool keeps their factors.

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..shard import Shard


@dataclass(frozen=True)
class DenseGroup:
    """Projections that read one input, whose outputs lie side by side.

    Attributes:
        targets: their names, those of the base model's dense targets.
        out_sizes: of this rank.
        input_cut: each rank has a part of the input and all of the output; else the other way
            round, or all of both.
    """

    targets: tuple[str, ...]
    out_sizes: tuple[int, ...]
    input_cut: bool = False


def dense_groups(shard: Shard, layer: int) -> dict[str, DenseGroup]:
    """Of one layer.

    Returns:
        "qkv": what attention projects from the hidden state. "q_b": queries from their latent.
        "o": attention's output. "gate_up" and "down": of the MLP that every token goes through,
        shared experts or that of a layer without experts. Those that the layer has.
    """
    model = shard.model
    groups: dict[str, DenseGroup] = {}

    def add(name: str, *targets: str) -> None:
        sizes = [high - low for low, high in map(shard.rows, targets)]
        groups[name] = DenseGroup(targets, tuple(sizes))

    if model.latent is None:
        add("qkv", "q_proj", "k_proj", "v_proj")
    elif model.latent.q_rank is None:
        add("qkv", "q_proj", "kv_a_proj_with_mqa")
    else:
        add("qkv", "q_a_proj", "kv_a_proj_with_mqa")
        add("q_b", "q_b_proj")
    groups["o"] = DenseGroup(("o_proj",), (model.hidden_size,), input_cut=True)
    if shard.mlp_intermediate(layer):
        module = "mlp"
        if layer >= model.dense_layers:
            module = "shared_expert" if model.latent is None else "shared_experts"
        add("gate_up", f"{module}.gate_proj", f"{module}.up_proj")
        down = (f"{module}.down_proj",)
        groups["down"] = DenseGroup(down, (model.hidden_size,), input_cut=True)
    return groups
