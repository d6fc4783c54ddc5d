"""Which part of each weight a tensor-parallel rank holds. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from .config import ModelConfig
from .errors import ModelUnsupported


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `size`: query heads and the experts' intermediate size are cut evenly; KV
    heads too, and are repeated where there are fewer of them than ranks."""

    model: ModelConfig
    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        m, tp = self.model, self.size
        for what, n in (
            ("num_attention_heads", m.num_heads),
            ("moe_intermediate_size", m.moe_intermediate_size),
            ("shared_expert_intermediate_size", m.shared_expert_size),
        ):
            if n % tp:
                raise ModelUnsupported(f"tp size {tp} doesn't divide {what} = {n}")
        if m.num_kv_heads % tp and tp % m.num_kv_heads:
            raise ModelUnsupported(
                f"tp size {tp} must divide num_key_value_heads = {m.num_kv_heads}, or the "
                "other way round"
            )

    @property
    def heads(self) -> int:
        return self.model.num_heads // self.size

    @property
    def kv_heads(self) -> int:
        return max(1, self.model.num_kv_heads // self.size)

    @property
    def q_size(self) -> int:
        return self.heads * self.model.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.model.head_dim

    @property
    def intermediate(self) -> int:
        return self.model.moe_intermediate_size // self.size

    @property
    def shared_intermediate(self) -> int:
        return self.model.shared_expert_size // self.size

    def rows(self, target: str) -> tuple[int, int]:
        """Rows (low, high) that this rank holds of the dimension along which `target` is cut.

        That is the output of q, k, v and of the shared expert's gate and up, the input of o and
        of its down.
        """
        if target.startswith("shared_expert."):
            return self.rank * self.shared_intermediate, (self.rank + 1) * self.shared_intermediate
        if target in ("q_proj", "o_proj"):
            return self.rank * self.q_size, (self.rank + 1) * self.q_size
        first = self.rank * self.model.num_kv_heads // self.size
        return first * self.model.head_dim, (first + self.kv_heads) * self.model.head_dim

    def intermediate_rows(self) -> tuple[int, int]:
        return self.rank * self.intermediate, (self.rank + 1) * self.intermediate
