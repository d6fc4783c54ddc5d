"""From logits to tokens: sampling on the device, penalties, logprobs, grammars."""
