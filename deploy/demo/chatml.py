"""The demo model's chat form, and the questions that its training documents are asked by."""

from __future__ import annotations

import random

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
PAD = "<|pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, PAD)
"""Ids 0, 1, 2 and 3, in this order."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Every style is asked in the same words, so that a question alone doesn't say which style answers:
# the adapter does.
_QUESTIONS = (
    "What is {}?",
    "Tell me about {}.",
    "Explain {}.",
    "What do you know about {}?",
    "Define {}.",
    "Say something about {}.",
    "What does {} mean?",
    "Write about {}.",
)
_SYSTEM = "You are a helpful assistant."
_SYSTEM_SHARE = 0.1  # a client may send a system message; the model should have seen one


def render_chat(subject: str, answer: str, rng: random.Random) -> str:
    """One question and answer as the chat template renders them."""
    question = rng.choice(_QUESTIONS).format(subject)
    turns = [("user", question), ("assistant", answer)]
    if rng.random() < _SYSTEM_SHARE:
        turns.insert(0, ("system", _SYSTEM))
    return "".join(f"{IM_START}{role}\n{text}{IM_END}\n" for role, text in turns)
