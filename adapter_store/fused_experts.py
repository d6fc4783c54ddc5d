"""Expert factors that PEFT keeps in one pair for all experts of a layer (`target_parameters`).

For a parameter [E, out, in] PEFT holds A [E*r, in], expert-major, and B [out, E*r], rank-major:
delta[e] = B.view(out, r, E)[:, :, e] @ A.view(E, r, in)[e]. Versions before 0.19 took the
parameter for [E, in, out], so that A has out columns and B has in rows ("swapped"):
delta[e] = (B.view(in, r, E)[:, :, e] @ A.view(E, r, out)[e]).T.

gpt-oss's parameters are [E, in, out] (`BaseModel.transposed_experts`). A and B have the same two
forms there, but other versions wrote them: the first before 0.19, and since then; the second since
0.19 over transformers 4, which doesn't tell PEFT that they are transposed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .base_model import BaseModel
from .canonical import LoraFactors
from .errors import AdapterRefused
from .factor_checks import Pair, check_rank, not_targeted, wrong_shape
from .peft_config import PeftConfig
from .peft_keys import FusedSite
from .quoting import safe_key, show
from .safetensors_header import TensorInfo
from .weights_file import WeightsFile

Parameter = Literal["gate_up_proj", "down_proj"]

# By whether the experts are transposed: who writes A and B swapped, and what to say where the
# shapes don't tell.
_SWAPPING = {False: "PEFT before 0.19", True: "PEFT from 0.19 over transformers 4"}
_BOTH_FIT = {
    False: "both as PEFT before 0.19 and as later versions lay it out; adapter_config.json must "
    "say peft_version",
    True: "both as PEFT lays it out over transformers 4 and over later ones, and nothing in the "
    "files says which; factors of the experts' other parameter beside it would",
}


@dataclass(frozen=True)
class FusedFactors:
    """One fused parameter's checked pair. `swapped` is None as long as nothing decided it."""

    layer: int
    parameter: Parameter
    rank: int
    scale: float
    a: TensorInfo
    b: TensorInfo
    swapped: bool | None


def check_fused(
    sites: Mapping[FusedSite, Pair], config: PeftConfig, base: BaseModel
) -> list[tuple[FusedFactors, bool]]:
    """Finds out what each pair adapts and checks its shapes.

    Returns:
        Each pair with whether its factors are swapped.

    Raises:
        AdapterRefused: "not_targeted", "wrong_shape", "rank_limit" or "ambiguous_layout".
    """
    if not sites:
        return []
    if projections := base.rewritten_projections:
        config = config.for_fused_experts(sorted({site.module for site in sites}), projections)
    found = [_identify(site, pair, config, base) for site, pair in sites.items()]
    return _orient(found, config.before_0_19, base)


def split(
    factors: FusedFactors, swapped: bool, weights: WeightsFile, base: BaseModel
) -> list[dict[str, LoraFactors]]:
    """Per expert, the factors by projection ("gate" and "up", or "down"), as views."""
    E, r, inter = base.num_experts, factors.rank, base.moe_intermediate
    a_ERI = weights.array(factors.a).reshape(E, r, -1)
    b_ORE = weights.array(factors.b).reshape(-1, r, E)
    experts = []
    for e in range(E):
        a, b = a_ERI[e], b_ORE[:, :, e]
        if swapped:
            a, b = b.T, a.T
        if factors.parameter == "down_proj":
            experts.append({"down": LoraFactors(factors.scale, a, b)})
        else:
            gate_up = (b[0::2], b[1::2]) if base.transposed_experts else (b[:inter], b[inter:])
            gate, up = (LoraFactors(factors.scale, a, part) for part in gate_up)
            experts.append({"gate": gate, "up": up})
    return experts


def _identify(site: FusedSite, pair: Pair, config: PeftConfig, base: BaseModel) -> FusedFactors:
    both: tuple[Parameter, ...] = ("gate_up_proj", "down_proj")
    targeted: list[Parameter] = [p for p in both if config.targets_parameter(f"{site.module}.{p}")]
    # PEFT wraps in the order of the parameters: the first one is the inner one.
    if not targeted or (site.inner and len(targeted) < 2):
        raise not_targeted(pair[0], f"{site.module}.gate_up_proj" if site.inner else site.module)
    parameter = targeted[0] if site.inner else targeted[-1]
    name = f"{site.module}.{parameter}"
    rank = config.rank_of(name)
    check_rank(pair, rank)

    H, inter = base.hidden, base.moe_intermediate
    in_, out = (H, 2 * inter) if parameter == "gate_up_proj" else (inter, H)
    rows = base.num_experts * rank
    a, b = pair
    straight = (a.shape, b.shape) == ((rows, in_), (out, rows))
    swapped = (a.shape, b.shape) == ((rows, out), (in_, rows))
    if not straight and not swapped:
        wrong, shape = (a, [rows, in_]) if a.shape != (rows, in_) else (b, [out, rows])
        raise wrong_shape(
            wrong, f"{shape} ({parameter} of {base.num_experts} experts at rank {rank})"
        )
    return FusedFactors(
        layer=site.layer,
        parameter=parameter,
        rank=rank,
        scale=config.scale_of(name),
        a=a,
        b=b,
        swapped=None if straight and swapped else swapped,
    )


def _orient(
    found: Sequence[FusedFactors], before_0_19: bool | None, base: BaseModel
) -> list[tuple[FusedFactors, bool]]:
    """One program wrote the whole file: where shapes fit both ways, the other pairs decide."""
    clear = {factors.swapped for factors in found} - {None}
    if len(clear) == 2:
        odd = next(factors for factors in found if factors.swapped)
        writer = _SWAPPING[base.transposed_experts]
        raise AdapterRefused(
            "wrong_shape",
            f"tensor {show(odd.a.name)} has A and B swapped, as {writer} wrote them, "
            "but other fused factors of the file don't",
            safe_key(odd.a.name),
        )
    if clear:
        decided = clear.pop()
    elif base.transposed_experts:
        decided = False if before_0_19 else None
    else:
        decided = before_0_19
    if decided is None:
        name = found[0].a.name
        raise AdapterRefused(
            "ambiguous_layout",
            f"tensor {show(name)} fits this model {_BOTH_FIT[base.transposed_experts]}",
            safe_key(name),
        )
    return [(factors, decided) for factors in found]
