"""A captured layer serves every later step: routing, slots and adapters change in place."""

from dataclasses import fields, replace

import pytest
import torch
from loraplex.kernels import LoraBatch, fused_moe, lora_linear, lora_linear_

from ..kernels.cases import Layer, assert_close
from ..kernels.factors import random_dense_tables
from ..kernels.poison import poisoned_memory
from . import reference
from .layers import DEVICE, LORA_ERROR, NEEDS_GPU, Case, assert_near, on_gpu, random_layer

pytestmark = NEEDS_GPU


def copied(layer: Layer) -> Layer:
    """The layer in memory of its own, which a graph is captured on."""
    tensors = {f.name: getattr(layer, f.name) for f in fields(layer)}
    own = {name: t.clone() for name, t in tensors.items() if isinstance(t, torch.Tensor)}
    return replace(layer, **own, tables=copied_tables(layer.tables))


def copied_tables(tables):
    tensors = {f.name: getattr(tables, f.name) for f in fields(tables)}
    own = {name: t.clone() for name, t in tensors.items() if isinstance(t, torch.Tensor)}
    return replace(tables, **own)


def overwrite(static, new) -> None:
    """What `static` holds becomes what `new` holds, at the same addresses."""
    for field in fields(static):
        mine, other = getattr(static, field.name), getattr(new, field.name)
        if isinstance(mine, torch.Tensor):
            mine.copy_(other)
        elif field.name == "tables":
            overwrite(mine, other)
        else:
            assert mine == other, f"{field.name} is fixed at capture"


def capture(step):
    """The graph of `step`, and what it returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


def step_of(layer: Layer):
    def step() -> torch.Tensor:
        lora_batch = LoraBatch.from_token_slot(layer.token_slot)  # its order, on the device
        return fused_moe(*layer.args(), layer.tables, lora_batch, **layer.options())

    return step


def other_steps(case: Case) -> dict[str, Layer]:
    """What may come after the step that a graph was captured on."""
    steps = {f"random {seed}": random_layer(case, seed) for seed in (1, 2, 3)}
    for number, name in enumerate(
        ("nobody adapted", "one adapter", "one expert", "nothing here", "ordered", "stale ranks")
    ):
        steps[name] = random_layer(case, 10 + number)
    steps["nobody adapted"].token_slot.fill_(-1)
    steps["one adapter"].token_slot.fill_(case.adapters - 1)
    steps["one expert"].topk_ids[:, 0] = 5
    steps["one expert"].topk_ids[:, 1:] = -1
    steps["nothing here"].topk_ids.fill_(-1)
    steps["ordered"].token_slot.copy_(steps["ordered"].token_slot.sort().values)
    # An adapter left: its offsets are gone, its ranks and scales still there.
    for name in ("offset_a13", "offset_b13", "offset_a2", "offset_b2"):
        getattr(steps["stale ranks"].tables, name)[0] = -1
    return steps


@pytest.mark.parametrize(
    ("tokens", "shared_outer"), [(1, False), (33, False), (33, True), (700, False)]
)
def test_replays_follow_what_changed_in_place(tokens, shared_outer):
    case = Case(tokens, 4, 16, 6, 32, torch.bfloat16)
    static = copied(random_layer(case))
    static.tables.shared_outer = shared_outer
    step = step_of(static)
    with poisoned_memory():
        graph, out = capture(step)
        graph.replay()
        assert_near(out, reference.moe(static), LORA_ERROR[case.dtype])
        for name, new in other_steps(case).items():
            new.tables.shared_outer = shared_outer
            overwrite(static, new)
            out.fill_(torch.nan)
            graph.replay()
            assert torch.equal(out, step()), f"{name}: not what an eager step gives"
            assert_near(out, reference.moe(static), LORA_ERROR[case.dtype])


def test_ranks_and_layouts_of_adapters_change_under_a_graph():
    """Nothing about an adapter was compiled or captured."""
    case = Case(40, 4, 16, 6, 32, torch.bfloat16)
    static = copied(random_layer(case))
    graph, out = capture(step_of(static))
    for seed, rank in enumerate((16, 64, 240, 32)):
        new = random_layer(replace(case, rank=rank), seed)
        new.tables.max_rank = static.tables.max_rank
        overwrite(static, new)
        graph.replay()
        assert_near(out, reference.moe(static), LORA_ERROR[case.dtype])


# Up to BESIDE_TOKENS the shrink runs on a stream of its own.
@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_dense_projections_under_a_graph(tokens):
    sizes = (48, 16, 16)
    tables = [
        on_gpu(random_dense_tables(seed, 5, 64, sizes, ranks=(0, 8, 16), dtype=torch.float16))
        for seed in range(3)
    ]
    # One pool for all, so that their tables can be written over each other's.
    pool = torch.cat([table.pool for table in tables])
    starts = [0, tables[0].pool.numel(), tables[0].pool.numel() + tables[1].pool.numel()]
    for table, start in zip(tables, starts, strict=True):
        table.pool = pool
        for name in ("offset_a", "offset_b"):
            offset = getattr(table, name)
            offset += torch.where(offset >= 0, start, 0)
    static = copied_tables(tables[0])
    x, base = (torch.randn(tokens, n, device=DEVICE).half() for n in (64, sum(sizes)))
    weight = torch.randn(sum(sizes), 64, device=DEVICE).half() / 8
    token_slot = torch.randint(-1, 5, (tokens,), device=DEVICE).int()

    def step() -> torch.Tensor:
        out = base.clone()
        batch = LoraBatch.from_token_slot(token_slot)
        assert batch is not None
        lora_linear_(out, x, static, batch)
        whole = lora_linear(x, weight, None, static, batch)
        # A second one that takes the memory which the first has left.
        return torch.cat([out, whole, lora_linear(x, weight, None, static, batch)])

    with poisoned_memory():
        graph, out = capture(step)
        for table in tables[1:]:
            overwrite(static, table)
            token_slot.copy_(torch.randint(-1, 5, (tokens,), device=DEVICE))
            x.normal_()
            graph.replay()
            assert torch.equal(out, step())
            added, *wholes = (part.cpu().float() for part in out.chunk(3))
            product = torch.nn.functional.linear(x, weight).cpu().float()
            for whole in wholes:
                assert_close(whole - product, added - base.cpu().float(), 1e-2)


@pytest.mark.parametrize("adapted", [True, False])
def test_no_step_waits_for_the_gpu(adapted):
    layer = random_layer(Case(40, 4, 16, 6, 32, torch.bfloat16))
    step = step_of(layer) if adapted else lambda: fused_moe(*layer.args())
    step()  # compiles, which may wait
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)
