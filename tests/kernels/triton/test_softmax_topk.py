"""The router's choice in one launch, against a slow one row by row."""

from __future__ import annotations

import pytest
import torch
from loraplex.kernels import softmax_topk as by_torch
from loraplex.kernels.gpu import softmax_topk

from ..poison import poisoned_memory
from .layers import TOLERANCE, interpreted

pytestmark = interpreted


def choose_slowly(logits, top_k, renormalise, padding):
    weights, ids = [], []
    for row, pad in zip(logits.double(), padding, strict=True):
        probs = torch.exp(row - row.max())
        probs /= probs.sum()
        best = sorted(range(len(row)), key=lambda e: (-row[e].item(), e))[:top_k]
        chosen = probs[best]
        weights.append(chosen / chosen.sum() if renormalise else chosen)
        ids.append([-1] * top_k if pad else best)
    return torch.stack(weights), torch.tensor(ids, dtype=torch.int32)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(("experts", "top_k"), [(8, 1), (60, 4), (128, 8), (5, 5), (72, 6)])
def test_as_row_by_row(experts, top_k, renormalise, dtype):
    # Different logits, in half precision too, and rows with a stride of their own.
    wide = torch.stack([torch.randperm(4 * experts) for _ in range(7)])[:, : experts + 3] / 16
    logits = wide.to(dtype)[:, :experts]
    padding = torch.rand(7) < 0.4
    wanted, wanted_ids = choose_slowly(logits, top_k, renormalise, padding)
    with poisoned_memory():
        results = [softmax_topk(logits, top_k, renormalise, padding[:, None])]
    results.append(by_torch(logits, top_k, renormalise, padding[:, None]))
    for weights, ids in results:
        assert ids.dtype == torch.int32
        assert torch.equal(ids, wanted_ids)
        torch.testing.assert_close(weights.double(), wanted, atol=1e-6, rtol=1e-5)


def test_without_padding_and_without_tokens():
    logits = torch.randn(3, 16)
    weights, ids = softmax_topk(logits, 2, True, None)
    wanted, wanted_ids = choose_slowly(logits, 2, True, [False] * 3)
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(weights.double(), wanted, atol=1e-6, rtol=1e-5)
    assert softmax_topk(logits[:0], 2, True, None)[1].shape == (0, 2)


def test_of_equal_logits_the_first_experts_are_chosen_and_nan_stays_in_range():
    logits = torch.zeros(2, 12)
    logits[1] = float("nan")
    _, ids = softmax_topk(logits, 3, False, None)
    assert ids[0].tolist() == [0, 1, 2]
    assert ((ids >= 0) & (ids < 12)).all()


def test_what_would_be_misread_is_refused():
    with pytest.raises(ValueError, match="top_k must be from 1 to 4"):
        by_torch(torch.zeros(2, 4), 5, True)
    with pytest.raises(ValueError, match=r"padding must have shape \[2, 1\]"):
        by_torch(torch.zeros(2, 4), 2, True, torch.zeros(2, dtype=torch.bool))
