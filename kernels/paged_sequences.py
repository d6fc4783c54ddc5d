"""Where the sequences of a step lie in a batch and in the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

TILE_TOKENS = 128  # new tokens of one sequence that a prefill item covers


@dataclass(frozen=True)
class PagedSequences:
    """S sequences with T new tokens, which follow each other in the batch. All tensors are int32 on
    the device, contiguous, and start at multiples of 16 bytes.

    Every sequence stands in `decode` (one new token) or, by tiles, in `prefill`. A row of padding
    is a decode sequence of length 0 whose write slot is -1: nothing is written for it, and its
    attention is zero.

    The tensors may be overwritten between steps, by a captured graph's owner; the host's numbers
    decide what is launched.
    """

    query_start: torch.Tensor  # [S + 1], first batch row of each sequence
    seq_lens: torch.Tensor  # [S], tokens with the new ones
    block_start: torch.Tensor  # [S], where a sequence's blocks begin in `blocks`
    blocks: torch.Tensor  # [any], cache blocks of each sequence in order
    write_slots: torch.Tensor  # [T], block * block_size + offset of each new token
    decode: torch.Tensor  # [N], sequences with one new token
    prefill: torch.Tensor  # [P, 2], (sequence, first of up to TILE_TOKENS new tokens)
    max_context: int  # no decode sequence is longer; decides how its keys are shared out
