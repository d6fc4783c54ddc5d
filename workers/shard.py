"""Which part of each weight a rank holds. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from .config import ModelConfig
from .errors import ModelUnsupported


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `size`.

    Query heads and a shared expert's intermediate size are cut evenly over all ranks; KV heads too,
    and are repeated where there are fewer of them than ranks.

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
        ):
            if n % tp:
                raise ModelUnsupported(f"tp size {tp} doesn't divide {what} = {n}")
        if m.moe_intermediate_size % (tp // ep):
            parts = f"tp size {tp}" if ep == 1 else f"tp size {tp} / ep size {ep} = {tp // ep}"
            raise ModelUnsupported(
                f"{parts} doesn't divide moe_intermediate_size = {m.moe_intermediate_size}"
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
        """Of each of this rank's experts."""
        first = self.expert_tp_rank * self.intermediate
        return first, first + self.intermediate
