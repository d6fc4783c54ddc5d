"""Tokens to text: pieces join to the whole, and stop strings act as if the text were one."""

from __future__ import annotations

import itertools
import json
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.cluster.errors import ApiError, SettingsError
from loraplex.cluster.gateway.assembler import ChoiceAssembler, prompt_tokens
from loraplex.cluster.gateway.chat_template import ChatTemplate
from loraplex.cluster.gateway.detokenizer import Detokenizer
from loraplex.cluster.gateway.logprobs import chat_logprobs, completion_logprobs
from loraplex.cluster.gateway.sampling import Plan
from loraplex.cluster.gateway.stop import StopScanner
from loraplex.cluster.gateway.tokenizer import TextTokenizer
from loraplex.workers import SamplingParams, TokenLogprob, TokenOutput
from tokenizers import Tokenizer, models

from tests.cluster.gateway_texts import EOS, SPECIAL, raw_tokenizer, text_tokenizer

VOCAB = raw_tokenizer().get_vocab_size()
any_ids = st.lists(st.integers(0, VOCAB + 3), max_size=40)
texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30)


@st.composite
def token_ids(draw: st.DrawFn) -> list[int]:
    """Random ids, or the tokens of random text with random cuts through its characters."""
    if draw(st.booleans()):
        return draw(any_ids)
    ids = raw_tokenizer().encode(draw(texts)).ids
    if ids and draw(st.booleans()):
        del ids[draw(st.integers(0, len(ids) - 1))]
    return ids


@given(token_ids(), st.booleans())
def test_pieces_join_to_the_text_of_the_whole_sequence(ids, skip):
    detokenizer = Detokenizer(text_tokenizer(), skip_special_tokens=skip)
    pieces = [detokenizer.push(i) for i in ids]
    assert "".join(pieces) + detokenizer.finish() == raw_tokenizer().decode(
        ids, skip_special_tokens=skip
    )


@given(texts)
def test_text_survives_the_round_trip_without_replacement_characters_before_the_end(text):
    detokenizer = Detokenizer(text_tokenizer(), skip_special_tokens=False)
    seen = ""
    for token_id in text_tokenizer().encode(text):
        seen += detokenizer.push(token_id)
        assert text.startswith(seen)
    assert seen == text
    assert detokenizer.finish() == ""


def slow_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: the first prefix that ends with a stop string, cut before the longest."""
    for end in range(len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


few = st.text(alphabet="aab#", max_size=24)
stop_lists = st.lists(st.text(alphabet="aab#", min_size=1, max_size=5), max_size=4)


@given(few, stop_lists, st.lists(st.integers(0, 24), max_size=6))
def test_stop_strings_act_the_same_however_the_text_is_cut(text, stops, cuts):
    scanner = StopScanner(stops)
    out = ""
    borders = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    for begin, end in itertools.pairwise(borders):
        out += scanner.push(text[begin:end])
        if scanner.stopped is not None:
            break
    else:
        out += scanner.finish()
    assert (out, scanner.stopped) == slow_stop(text, stops)


@given(few, stop_lists)
def test_only_what_may_still_become_a_stop_string_is_held_back(text, stops):
    scanner = StopScanner(stops)
    out = ""
    for i, char in enumerate(text):
        out += scanner.push(char)
        if scanner.stopped is not None:
            return
        held = text[: i + 1][len(out) :]
        beginnings = [
            s[:n] for s in stops for n in range(1, len(s)) if text[: i + 1].endswith(s[:n])
        ]
        assert held == max(beginnings, key=len, default="")


def plan_for(stops=(), top=None, min_tokens=0, skip=True) -> Plan:
    return Plan(
        sampling=SamplingParams(min_tokens=min_tokens, logprobs=top),
        max_tokens=99,
        seed=0,
        n=1,
        stops=tuple(stops),
        top=top,
        skip_special_tokens=skip,
    )


def logprob(token_id: int) -> TokenLogprob:
    return TokenLogprob(token_id, -token_id / 7, 1, ((token_id, -token_id / 7), (65, -9.5)))


def run_choice(ids, plan, steps, reason="length"):
    """Feeds ids in the given portions; the text, tokens, reason and what left at each step."""
    assembler = ChoiceAssembler(text_tokenizer(), plan)
    deltas = []
    borders = sorted({0, len(ids), *(s for s in steps if s < len(ids))})
    portions = list(itertools.pairwise(borders)) or [(0, 0)]
    for begin, end in portions:
        last = end == len(ids)
        part = ids[begin:end]
        output = TokenOutput(
            "r", part, [logprob(i) for i in part], finish_reason=reason if last else None
        )
        deltas.append(assembler.push(output))
        if deltas[-1].finish_reason:
            break
    text = "".join(d.text for d in deltas)
    tokens = [t for d in deltas for t in d.tokens]
    return text, tokens, deltas[-1].finish_reason, assembler.completion_tokens


@settings(max_examples=300)
@given(token_ids(), st.lists(st.integers(1, 40), max_size=8), st.lists(texts, max_size=3))
def test_a_streamed_choice_is_the_whole_choice(ids, steps, stops):
    stops = [s for s in stops if s]
    whole = raw_tokenizer().decode(ids)
    if whole:  # a stop string that does occur, as often as not
        middle = len(whole) // 2
        stops.append(whole[middle : middle + 2])
    plan = plan_for(stops, top=1)
    text, tokens, reason, count = run_choice(ids, plan, steps)
    at_once = run_choice(ids, plan, [])
    assert (text, tokens, reason, count) == at_once
    expected, stop = slow_stop(whole, stops)
    assert text == expected
    assert reason == ("stop" if stop is not None else "length")


@settings(max_examples=300)
@given(token_ids(), st.lists(st.integers(1, 40), max_size=8))
def test_logprob_tokens_join_to_the_text_and_their_offsets_point_into_it(ids, steps):
    text, tokens, _, count = run_choice(ids, plan_for(top=1), steps)
    assert [t.token_id for t in tokens] == list(ids)
    assert count == len(ids)
    assert "".join(t.text for t in tokens) == text
    assert all(text[t.offset : t.end] == t.text for t in tokens)
    chat = chat_logprobs(text_tokenizer(), tokens, 1)["content"]
    special = [text_tokenizer().is_special(t.token_id) for t in tokens]
    assert "".join(c["token"] for c, s in zip(chat, special, strict=True) if not s) == text
    raw = b"".join(bytes(c["bytes"]) for c, s in zip(chat, special, strict=True) if not s)
    assert raw.decode(errors="replace") == text
    assert all(len(c["top_logprobs"]) == 1 for c in chat)


@settings(max_examples=300)
@given(token_ids(), st.lists(st.integers(1, 40), max_size=8), st.integers(0, 200))
def test_logprobs_end_with_the_text_when_a_stop_string_cuts_it(ids, steps, where):
    whole = raw_tokenizer().decode(ids)
    stop = whole[where % len(whole) :][:3] if whole else "x"
    text, tokens, reason, _ = run_choice(ids, plan_for([stop], top=0), steps)
    joined = "".join(t.text for t in tokens)
    assert joined.startswith(text)
    if reason == "stop":
        assert all(t.offset < len(text) for t in tokens)
    else:
        assert joined == text


def test_stop_strings_count_only_after_min_tokens():
    ids = text_tokenizer().encode("stop stop stop")
    first = text_tokenizer().decode(ids[:2])
    text, _, reason, _ = run_choice(ids, plan_for(["stop"], min_tokens=2), [1, 2, 3])
    assert reason == "stop"
    assert text.startswith(first)
    assert len(text) < len("stop stop stop")


def test_the_stop_token_has_no_text_and_no_logprob_but_counts():
    ids = [*text_tokenizer().encode("done"), EOS]
    text, tokens, reason, count = run_choice(ids, plan_for(top=0, skip=False), [1], "stop")
    assert (text, reason, count) == ("done", "stop", len(ids))
    assert EOS not in [t.token_id for t in tokens]


def test_completion_logprobs_name_the_chosen_token_and_count_offsets_in_characters():
    ids = text_tokenizer().encode("aé🙂 end")
    _, tokens, _, _ = run_choice(ids, plan_for(top=2), [])
    body = completion_logprobs(text_tokenizer(), tokens, 2, base_offset=10)
    assert "".join(body["tokens"]) == "aé🙂 end"
    offset = 10
    for name, at, top in zip(
        body["tokens"], body["text_offset"], body["top_logprobs"], strict=True
    ):
        assert at == offset
        assert name in top
        offset += len(name)


def test_minus_infinity_is_written_as_a_number():
    ids = text_tokenizer().encode("a")
    tokens = prompt_tokens(
        text_tokenizer(), tuple(ids), [TokenLogprob(ids[0], float("-inf"), 9, ())]
    )
    assert completion_logprobs(text_tokenizer(), tokens, 0)["token_logprobs"] == [-9999.0]


def test_part_of_a_character_is_named_by_its_bytes():
    first = text_tokenizer().encode("\u0f3c")  # not in the training texts: bytes
    assert len(first) > 1
    assert text_tokenizer().token_name(first[0]) == "bytes:\\xe0"


def test_template_conventions_of_transformers():
    template = ChatTemplate(
        "{{ bos_token }}{%- for m in messages %}"
        "{%- if m.role == 'bad' %}{{ raise_exception('no ' + m.role) }}{% endif %}"
        "{%- if loop.index > 2 %}{% break %}{% endif %}"
        "{% generation %}[{{ m.role }}:{{ m.content | tojson }}]{% endgeneration %}"
        "{%- endfor %}{% if add_generation_prompt %}>{% endif %}{% if thinking %}T{% endif %}",
        {"bos_token": "<s>"},
    )
    messages = [{"role": "user", "content": 'é"'}, {"role": "assistant", "content": "b"}] * 2
    assert template.render(messages, thinking=True) == '<s>[user:"é\\""][assistant:"b"]>T'
    with pytest.raises(ApiError, match="no bad"):
        template.render([{"role": "bad", "content": ""}])
    with pytest.raises(ApiError):  # the sandbox
        ChatTemplate("{{ messages.__class__.__mro__ }}", {}).render([])
    with pytest.raises(SettingsError, match="line 1"):
        ChatTemplate("{% for %}", {})


def made(**changes: Any) -> TextTokenizer:
    """The tokenizer with other parts."""
    facts = {**json.loads(raw_tokenizer().to_str()), **changes}
    return TextTokenizer(Tokenizer.from_str(json.dumps(facts)), None, 8)


@given(st.lists(st.sampled_from([*SPECIAL, "<think>", "<a b>", " dogs,", "e\u0301", "\u1f82"])))
def test_no_token_stands_for_more_characters_than_the_longest(pieces):
    for tokenizer in (text_tokenizer(), made(normalizer={"type": "NFC"})):
        text = unicodedata.normalize("NFD", "".join(pieces))
        assert tokenizer.chars_per_token is not None
        assert len(text) <= len(tokenizer.encode(text)) * tokenizer.chars_per_token


def test_the_longest_token_may_be_an_added_one():
    longest = max(map(len, raw_tokenizer().get_vocab()))
    assert text_tokenizer().chars_per_token == longest
    assert made(normalizer={"type": "NFC"}).chars_per_token == 4 * longest
    tokenizer = Tokenizer.from_str(raw_tokenizer().to_str())
    tokenizer.add_tokens(["x" * 100])
    assert TextTokenizer(tokenizer, None, 8).chars_per_token == 100


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "StripAccents"}]}},
        {"pre_tokenizer": {"type": "WhitespaceSplit"}},
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "Split",
                        "pattern": {"String": " "},
                        "behavior": "Removed",
                        "invert": False,
                    },
                    json.loads(raw_tokenizer().to_str())["pre_tokenizer"],
                ],
            }
        },
        {
            "truncation": {
                "direction": "Right",
                "max_length": 8,
                "strategy": "LongestFirst",
                "stride": 0,
            }
        },
        {
            "added_tokens": [
                {**token, "lstrip": token["id"] == 0}
                for token in json.loads(raw_tokenizer().to_str())["added_tokens"]
            ]
        },
    ],
)
def test_tokens_have_no_bound_where_a_tokenizer_may_drop_text(changes):
    assert made(**changes).chars_per_token is None


def test_a_tokenizer_that_is_not_byte_level_is_refused():
    with pytest.raises(SettingsError, match="byte-level"):
        TextTokenizer(Tokenizer(models.BPE()), None, 8)


def test_a_folder_without_tokenizer_names_the_file(tmp_path):
    with pytest.raises(SettingsError, match=r"tokenizer\.json"):
        TextTokenizer.from_folder(tmp_path)
