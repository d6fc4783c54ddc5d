"""A small byte-level BPE tokenizer, trained here, with the demo model's special tokens."""

from __future__ import annotations

import functools

from loraplex.cluster.gateway.chat_template import ChatTemplate
from loraplex.cluster.gateway.tokenizer import TextTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
EOS = 2
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_TEXTS = [
    "the quick brown fox jumps over the lazy dog and the other dogs, again and again",
    "Füße, naïve café, Ελληνικά, русский текст, 日本語の文章, 中文句子, 한국어, 🙂🙃👩‍👩‍👧",
    "stop words: stop, stopping, stopped. END of text; end of line\n\n",
]


@functools.cache
def raw_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS * 4, trainer)
    # Plain added tokens: one of the byte alphabet's letters only, one with a space in it.
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("<a b>")])
    return tokenizer


@functools.cache
def text_tokenizer() -> TextTokenizer:
    template = ChatTemplate(TEMPLATE, {"eos_token": "<|im_end|>"})
    return TextTokenizer(raw_tokenizer(), template, context_length=512, eos_ids=(EOS, 0))
