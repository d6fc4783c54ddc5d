"""What transformers and PEFT answer on the demo model, in float32."""

from __future__ import annotations

from collections.abc import Sequence

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.runs import DEMO
from tests.e2e.service import BASE, FOLDERS

MODEL = DEMO / "model"


class Oracle:
    """One adapter on the base model, or the base model alone."""

    def __init__(self, name: str) -> None:
        model = AutoModelForCausalLM.from_pretrained(
            MODEL, dtype=torch.float32, experts_implementation="eager"
        )
        if name != BASE:
            model = peft.PeftModel.from_pretrained(model, FOLDERS[name])
        self._model = model.eval()
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def greedy(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """The continuation's ids, a token that ends it included."""
        ids = torch.tensor([list(prompt)])
        with torch.no_grad():
            out = self._model.generate(  # pyright: ignore[reportAttributeAccessIssue]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
            )
        return out[0, ids.shape[1] :].tolist()

    def logprobs(self, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
        """The logprob of each token of an answer."""
        ids = torch.tensor([*prompt, *answer])
        with torch.no_grad():
            logits = self._model(ids[None]).logits[0]
        rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        return rows.gather(1, ids[len(prompt) :, None])[:, 0].tolist()

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)
