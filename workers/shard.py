"""Which part of each weight a tensor-parallel rank holds. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from .config import ModelConfig
from .errors import ModelUnsupported


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `size`: query heads and the intermediate sizes of experts and MLPs are cut
    evenly; KV heads too, and are repeated where there are fewer of them than ranks. Projections to
    latents are repeated on every rank."""

    model: ModelConfig
    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        m, tp = self.model, self.size
        for what, n in (
            ("num_attention_heads", m.num_heads),
            ("moe_intermediate_size", m.moe_intermediate_size),
            ("shared_expert_intermediate_size", m.shared_expert_size),
            ("intermediate_size", m.dense_size),
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

    def mlp_intermediate(self, layer: int) -> int:
        """Of what every token of the layer goes through: shared experts, or the MLP of a layer
        without experts. 0: there is none."""
        m = self.model
        return (m.dense_size if layer < m.dense_layers else m.shared_expert_size) // self.size

    def rows(self, target: str) -> tuple[int, int]:
        """Rows (low, high) that this rank holds of the dimension along which `target` is cut.

        That is the output of q, k, v, kv_b and of an MLP's gate and up, the input of o and of an
        MLP's down; of projections to latents, which aren't cut, the whole output.
        """
        m = self.model
        module, _, name = target.rpartition(".")
        if module:
            return self._part(m.dense_size if module == "mlp" else m.shared_expert_size)
        if m.latent is not None:
            widths = {"o_proj": m.latent.value, "kv_b_proj": m.latent.nope + m.latent.value}
            if name == "q_a_proj":
                return 0, m.latent.q_rank or 0
            if name == "kv_a_proj_with_mqa":
                return 0, m.latent.cached
            return self._part(m.num_heads * widths.get(name, m.head_dim))
        if name in ("q_proj", "o_proj"):
            return self._part(m.num_heads * m.head_dim)
        first = self.rank * m.num_kv_heads // self.size
        return first * m.head_dim, (first + self.kv_heads) * m.head_dim

    def intermediate_rows(self) -> tuple[int, int]:
        return self._part(self.model.moe_intermediate_size)

    def _part(self, whole: int) -> tuple[int, int]:
        part = whole // self.size
        return self.rank * part, (self.rank + 1) * part
