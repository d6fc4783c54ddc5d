"""Which part of each weight a rank holds. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from .config import ModelConfig
from .errors import ModelUnsupported
from .families import FP8_BLOCK


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `size`.

    Query heads and the intermediate sizes of shared experts and of layers' MLPs are cut evenly over
    all ranks; KV heads too, and are repeated where there are fewer of them than ranks. Projections
    to latents are repeated on every rank.

    Routed experts are split over `ep` groups of neighbouring ranks; within a group, each expert's
    intermediate size I is cut. With 4 ranks, ep 2 and 8 experts:

        rank  ep_rank  experts  part of I
        0     0        0 to 3   first half
        1     0        0 to 3   second half
        2     1        4 to 7   first half
        3     1        4 to 7   second half
    """

    model: ModelConfig
    rank: int = 0
    size: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        m, tp, ep = self.model, self.size, self.ep
        if tp % ep:
            raise ModelUnsupported(f"ep size {ep} doesn't divide the tp size {tp}")
        if m.num_experts % ep:
            raise ModelUnsupported(f"ep size {ep} doesn't divide num_experts = {m.num_experts}")
        for what, n in (
            ("num_attention_heads", m.num_heads),
            ("shared_expert_intermediate_size", m.shared_expert_size),
            ("intermediate_size", m.dense_size),
        ):
            if n % tp:
                raise ModelUnsupported(f"tp size {tp} doesn't divide {what} = {n}")
        if m.moe_intermediate_size % (tp // ep):
            parts = f"tp size {tp}" if ep == 1 else f"tp size {tp} / ep size {ep} = {tp // ep}"
            raise ModelUnsupported(
                f"{parts} doesn't divide moe_intermediate_size = {m.moe_intermediate_size}"
            )
        if m.quantisation == "fp8" and self.intermediate % FP8_BLOCK:
            blocks = f"the {FP8_BLOCK}-blocks of FP8 weights"
            if m.moe_intermediate_size % FP8_BLOCK:
                raise ModelUnsupported(
                    f"moe_intermediate_size = {m.moe_intermediate_size} isn't a multiple of "
                    f"{FP8_BLOCK}, so gate and up rows would meet within {blocks}"
                )
            raise ModelUnsupported(
                f"tp size {tp} / ep size {ep} = {tp // ep} cuts moe_intermediate_size = "
                f"{m.moe_intermediate_size} within {blocks}; use --ep to split the experts over "
                f"ranks, so that each rank's part of one is a multiple of {FP8_BLOCK}"
            )
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
    def ep_rank(self) -> int:
        """The group of ranks that this one holds its experts with."""
        return self.rank // self.expert_tp

    @property
    def experts(self) -> range:
        """The experts that this rank holds a part of."""
        return self.experts_of(self.ep_rank)

    def experts_of(self, ep_rank: int) -> range:
        count = self.model.num_experts // self.ep
        return range(ep_rank * count, (ep_rank + 1) * count)

    @property
    def expert_tp(self) -> int:
        """Parts that one expert's intermediate size is cut into."""
        return self.size // self.ep

    @property
    def expert_tp_rank(self) -> int:
        """Which of these parts this rank holds."""
        return self.rank % self.expert_tp

    @property
    def intermediate(self) -> int:
        """Of one routed expert on this rank."""
        return self.model.moe_intermediate_size // self.expert_tp

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
        """Of each of this rank's experts."""
        first = self.expert_tp_rank * self.intermediate
        return first, first + self.intermediate

    def _part(self, whole: int) -> tuple[int, int]:
        part = whole // self.size
        return self.rank * part, (self.rank + 1) * part
