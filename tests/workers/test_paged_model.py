"""A whole model on the path that GPUs take between its projections, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from loraplex.kernels import gpu as kernels_gpu
from loraplex.workers import model_runner
from loraplex.workers.attention import DecodeBuffers, PagedBatch
from loraplex.workers.comm import Comm
from loraplex.workers.model_runner import ModelRunner
from loraplex.workers.models import decoder
from loraplex.workers.step import SequenceStep, Step
from triton import knobs

from .tiny_models import VOCAB, make_tiny_model

pytestmark = pytest.mark.skipif(
    not knobs.runtime.interpret,
    reason="needs Triton's interpreter: TRITON_INTERPRET=1 in the environment",
)


def two_steps() -> list[Step]:
    """Prompts, then a longer chunk of one of them beside decode."""
    prompts = [torch.randint(1, VOCAB, (n,)).tolist() for n in (5, 21, 1)]
    blocks = [[7], [3, 9, 2], [4]]
    first = [SequenceStep(p, 0, b, -1, 0) for p, b in zip(prompts, blocks, strict=True)]
    second = [
        SequenceStep([9], 5, blocks[0], -1, 0),
        SequenceStep([4, 5, 6], 21, blocks[1], -1, 0),
        SequenceStep([8], 1, blocks[2], -1, 0),
    ]
    return [Step(first), Step(second)]


# Norm of heads; of all heads together; none, but windows, sinks, biases and YaRN; latents and YaRN.
@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3"])
def test_logits_are_those_of_the_torch_path(family, tmp_path, monkeypatch) -> None:
    config = make_tiny_model(family, tmp_path).config(kv_tokens=256, max_model_len=64)
    steps = two_steps()
    by_torch, paged = ModelRunner(config, Comm()), ModelRunner(config, Comm())
    expected = [by_torch.run(step) for step in steps]
    buffers = DecodeBuffers(4, 32, config.block_size, torch.device("cpu"))
    decode = [SequenceStep([3], 6, [7], -1, 0), SequenceStep([2], 2, [4], -1, 0)]
    expected.append(by_torch.run(Step(decode)))
    more = [SequenceStep([5], 24, [3, 9, 2], -1, 0), SequenceStep([6], 7, [7], -1, 0)]
    more.append(SequenceStep([1], 3, [4], -1, 0))
    expected.append(by_torch.run(Step(more)))

    monkeypatch.setattr(model_runner, "plan_attention", PagedBatch.plan)
    monkeypatch.setattr(decoder, "add_rms_norm_", kernels_gpu.add_rms_norm_)
    got = [paged.run(step) for step in steps]
    buffers.fill(decode)
    monkeypatch.setattr(model_runner, "plan_attention", lambda *_: buffers.batch(2, 64))
    got.append(paged.run(Step(decode)))
    paged.graphs = paged.decode_graphs()  # a row of padding beside the three
    got.append(paged.run(Step(more)))
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-4)
