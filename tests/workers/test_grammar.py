"""Generated text follows its grammar to the letter, wherever a sequence is taken up."""

from __future__ import annotations

import json
import random
import re
import threading
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from loraplex.workers import (
    GenerationRequest,
    Grammar,
    GrammarInvalid,
    SamplingParams,
    check_grammar,
)
from loraplex.workers.sampling.grammar import MAX_CHOICES, Grammars, fill_masks
from loraplex.workers.sampling.grammar_conjunctions import check_conjunctions
from loraplex.workers.sampling.grammar_limits import check_multiples
from loraplex.workers.sampling.sampler import Draw, SamplingBatch, sample
from tokenizers import Tokenizer

from .conftest import DEMO, TENANT

EOS = 2
VOCAB = 4096
PADDED = VOCAB + 71  # a model's rows may be more than its tokenizer's tokens
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"enum": ["small", "größer"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "size", "count", "tags"],
    "additionalProperties": False,
}
JSON = Grammar("json_schema", json.dumps(SCHEMA))
FORMS = [
    JSON,
    Grammar("regex", r"(ab|[0-9]{2,4})-é+!"),
    Grammar("choice", json.dumps(["yes", 'no "quoted"', "line\nbreak", "naïve\\"])),
    Grammar("grammar", 'start: "<" word ("," word)* ">"\nword: /[a-z]{1,3}/'),
    Grammar("grammar", 'root ::= "x" root "y" | "z"'),
]


def follows(grammar: Grammar, text: str) -> bool:
    """Whether a whole text is one that the grammar describes, found without llguidance."""
    if grammar.kind == "json_schema":
        jsonschema.validate(json.loads(text), json.loads(grammar.text))
        return True
    if grammar.kind == "choice":
        return text in json.loads(grammar.text)
    if grammar.kind == "regex":
        return re.fullmatch(grammar.text, text) is not None
    if grammar.text.startswith("start"):
        return re.fullmatch(r"<[a-z]{1,3}(,[a-z]{1,3})*>", text) is not None
    depth = text.index("z")
    return text == "x" * depth + "z" + "y" * depth


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(DEMO / "model", PADDED, [EOS])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "model" / "tokenizer.json"))


def allowed(state, banned=()) -> set[int]:
    words = fill_masks([(state, banned)], PADDED)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


@pytest.mark.parametrize("form", FORMS, ids=lambda g: g.kind)
def test_a_random_walk_makes_a_text_of_the_grammar(grammars, tokenizer, form):
    check_grammar(form)
    for _ in range(20):
        state, tokens = grammars.start(form), []
        while not state.finished and len(tokens) < 300:
            choices = allowed(state)
            assert choices
            assert max(choices) < VOCAB, "an id that the tokenizer lacks"
            # Ends where it may, and prefers short ways: unbounded forms would take long.
            token = EOS if EOS in choices else random.choice(sorted(choices))
            tokens.append(token)
            state.advance(token)
            assert state.error is None
        if state.finished:
            text = tokenizer.decode([t for t in tokens if t != EOS])
            assert follows(form, text), text


def test_a_state_that_is_taken_up_allows_what_the_first_one_did(grammars):
    state, tokens = grammars.start(JSON), []
    while not state.finished:
        assert allowed(grammars.start(JSON, tokens)) == allowed(state)
        token = random.choice(sorted(allowed(state)))
        tokens.append(token)
        state.advance(token)
    assert grammars.start(JSON, tokens).finished
    with pytest.raises(GrammarInvalid, match="don't follow"):
        grammars.start(JSON, [*tokens, 50])


def test_states_of_one_grammar_dont_share_their_places(grammars, tokenizer):
    first, second = grammars.start(JSON), grammars.start(JSON)
    before = allowed(second)
    first.advance(next(iter(allowed(first))))
    assert allowed(second) == before


def test_a_token_that_is_not_allowed_is_an_error(grammars, tokenizer):
    state = grammars.start(JSON)
    state.advance(tokenizer.encode("x").ids[0])
    assert state.error


def test_banned_ids_leave_the_mask_unless_nothing_would_be_left(grammars, tokenizer):
    state = grammars.start(Grammar("regex", "ab*"))
    for token in tokenizer.encode("ab").ids:
        state.advance(token)
    assert EOS in allowed(state)
    assert allowed(state, (EOS, 10**6)) == allowed(state) - {EOS}
    ended = grammars.start(Grammar("regex", "ab"))
    for token in tokenizer.encode("ab").ids:
        ended.advance(token)
    assert allowed(ended, (EOS,)) == {EOS}


def test_masks_reach_the_logits_of_their_rows_alone(grammars):
    logits = torch.randn(5, PADDED)
    states = {1: grammars.start(JSON), 4: grammars.start(FORMS[1])}
    draws = [
        Draw(SamplingParams(temperature=0, logit_bias=((9, 100.0),)), 0, grammar=states.get(i))
        for i in range(5)
    ]
    changed = logits.clone()
    tokens = sample(changed, SamplingBatch.build(draws, PADDED, logits.device)).to_host().tokens
    for i in range(5):
        expected = logits[i].clone()
        expected[9] += 100
        if i in states:
            keep = torch.zeros(PADDED, dtype=torch.bool)
            keep[sorted(allowed(states[i]))] = True
            expected[~keep] = float("-inf")
        assert torch.equal(changed[i], expected)
        assert tokens[i] == expected.argmax()


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar("json_schema", "{"), "EOF"),
        (Grammar("json_schema", '{"type": "objekt"}'), "objekt"),
        (Grammar("json_schema", '{"$ref": "http://127.0.0.1:9/x"}'), "not fetch"),
        (Grammar("json_schema", '{"not": {}}'), "not"),
        (Grammar("regex", "(a"), "unclosed"),
        (Grammar("choice", "[]"), "1 to"),
        (Grammar("choice", json.dumps(["a"] * (MAX_CHOICES + 1))), "1 to"),
        (Grammar("choice", '["a", 1]'), "list of texts"),
        (Grammar("grammar", "start: nothing"), "nothing"),
        (Grammar("yaml", "a"), "yaml"),  # type: ignore[arg-type]
    ],
)
def test_what_cant_be_compiled_is_refused_with_the_reason(grammars, grammar, message):
    with pytest.raises(GrammarInvalid, match=message):
        check_grammar(grammar)
    with pytest.raises(GrammarInvalid, match=message):
        grammars.start(grammar)


def doubling(levels: int, notation: str) -> Grammar:
    """A text of 2^levels parts, said in `levels` lines."""
    is_, name = (": ", "T") if notation == "lark" else (" ::= ", "r")
    lines = [f"{name}{i}{is_}{name}{i + 1} {name}{i + 1}" for i in range(levels)]
    start = "start: T0" if notation == "lark" else "root ::= r0"
    return Grammar("grammar", "\n".join([start, *lines, f'{name}{levels}{is_}"{"ab" * 500}"']))


@pytest.mark.parametrize("notation", ["lark", "gbnf"])
@pytest.mark.parametrize("levels", [13, 18, 30])
def test_a_grammar_that_doubles_itself_is_refused_early(levels, notation):
    with pytest.raises(GrammarInvalid, match=r"too big|too large"):
        check_grammar(doubling(levels, notation))
    check_grammar(doubling(3, notation))


def patterns(count: int) -> list[dict[str, str]]:
    return [{"type": "string", "pattern": f"w{i}"} for i in range(count)]


def by_names(count: int) -> dict[str, Any]:
    """Each definition says one pattern more than the one before."""
    named = {
        str(i): {"pattern": f"w{i}", **({"$ref": f"#/$defs/{i - 1}"} if i else {})}
        for i in range(count)
    }
    return {"$defs": named, "$ref": f"#/$defs/{count - 1}"}


TOGETHER = [  # what they are, and whether they may be asked for
    ({"allOf": patterns(3)}, True),
    ({"allOf": patterns(22)}, False),
    ({"allOf": [{"properties": {"a": one}} for one in patterns(22)]}, False),
    ({"allOf": [{"anyOf": [one, {"type": "null"}]} for one in patterns(22)]}, False),
    ({"type": "object", "properties": dict(enumerate(patterns(16)))}, True),
    ({"anyOf": patterns(30)}, True),
    (by_names(4), True),
    (by_names(22), False),
    ({"$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"}, True),
    ({"$defs": {"a": {"allOf": patterns(22)}}, "items": {"$ref": "#/$defs/a"}}, False),
]


@pytest.mark.parametrize(("schema", "allowed"), TOGETHER, ids=[str(s)[:60] for s, _ in TOGETHER])
def test_patterns_that_would_be_multiplied_out_for_minutes_are_refused(schema, allowed):
    text = json.dumps(schema)
    for lark in (False, True):
        written = f"start: %json {text}" if lark else text
        if allowed:
            check_conjunctions(written, lark=lark)
        else:
            with pytest.raises(GrammarInvalid, match="apply to one text"):
                check_grammar(Grammar("grammar" if lark else "json_schema", written))


def test_a_number_that_python_refuses_hides_nothing():
    text = json.dumps({"allOf": patterns(22)})[:-1] + f', "maximum": 1{"0" * 5000}}}'
    with pytest.raises(GrammarInvalid, match="apply to one text"):
        check_grammar(Grammar("json_schema", text))


def test_a_terminal_of_many_patterns_at_once_is_refused():
    def terminal(count: int) -> Grammar:
        return Grammar("grammar", "start: A\nA: " + " & ".join(["/.*w.*/"] * count))

    check_grammar(terminal(5))
    with pytest.raises(GrammarInvalid, match="& is written 21 times"):
        check_grammar(terminal(22))


MULTIPLES = [  # what they are, and whether they may be asked for
    ({"type": "integer", "multipleOf": 99991}, True),
    ({"type": "integer", "multipleOf": 100_003}, False),
    ({"type": "number", "multipleOf": 100.003}, False),
    ({"type": "integer", "multipleOf": 10**12}, True),
    ({"type": "number", "multipleOf": 1e-2}, True),
    ({"type": "integer", "multipleOf": 2**20}, False),
    ({"type": "integer", "multipleOf": 997, "allOf": [{"multipleOf": 991}]}, False),
    ({"anyOf": [{"type": "integer", "multipleOf": 7 + i} for i in range(30)]}, False),
    ({"anyOf": [{"type": "integer", "multipleOf": 4 * i} for i in range(1, 5)]}, True),
    ({"type": "integer", "multipleOf": "1" * 5000}, True),  # llguidance says why not
    ({"properties": {"multipleOf": {"type": "integer"}}}, True),
]


@pytest.mark.parametrize(("schema", "allowed"), MULTIPLES)
def test_multiples_that_need_large_automata_are_refused(schema, allowed):
    text = json.dumps(schema)
    for written in (text, text.replace("multipleOf", "multiple\\u004ff")):
        for given in (
            Grammar("json_schema", written),
            Grammar("grammar", f"start: %json {written}"),
        ):
            if allowed:
                check_multiples(given.text)
            else:
                with pytest.raises(GrammarInvalid, match="multipleOf is given"):
                    check_grammar(given)


@pytest.mark.parametrize(
    ("option", "schema"),
    [
        ("lenient", {"type": "array", "uniqueItems": True}),
        ("coerce_one_of", {"oneOf": [{"type": "string"}, {"maxLength": 3, "type": "string"}]}),
    ],
)
def test_a_schema_cant_ask_for_its_keywords_to_be_dropped(option, schema):
    for given in (schema, {**schema, "x-guidance": {option: True}}):
        with pytest.raises(GrammarInvalid):
            check_grammar(Grammar("json_schema", json.dumps(given)))


def test_a_model_without_a_tokenizer_says_so(tmp_path):
    with pytest.raises(GrammarInvalid, match=r"tokenizer\.json"):
        Grammars(tmp_path, 10, []).start(JSON)


def test_an_engine_answers_in_json_whatever_the_adapter_and_goes_on_elsewhere(
    demo, make_engine, run, tokenizer
):
    def ask(name: str, seed: int, **changes: Any) -> GenerationRequest:
        # Enough for a model that writes all the blanks it may, up to 65 in each place.
        params = SamplingParams(max_tokens=900, seed=seed, grammar=JSON, **changes)
        ref = random.choice([None, *demo.refs.values()])
        return GenerationRequest(name, (10, 11, 12), params, TENANT, ref)

    requests = [
        ask("plain", 1),
        ask("greedy", 2, temperature=0.0),
        ask("patient", 3, min_tokens=90, ignore_eos=True),
        ask("penalised", 4, repetition_penalty=1.2, frequency_penalty=0.5, top_p=0.9),
    ]
    free = GenerationRequest("free", (10,), SamplingParams(max_tokens=40, seed=5), TENANT)
    results = run(make_engine(), [*requests, free])
    assert results["free"].tokens == run(make_engine(), [free])["free"].tokens
    for request in requests:
        result = results[request.request_id]
        assert result.last.error is None
        assert result.last.finish_reason == "stop", tokenizer.decode(result.tokens)
        assert follows(JSON, tokenizer.decode(result.tokens))
        cut = random.randrange(1, len(result.tokens))
        rest = GenerationRequest(
            "rest",
            request.prompt_ids,
            request.sampling,
            TENANT,
            request.adapter,
            tuple(result.tokens[:cut]),
        )
        assert run(make_engine(), [rest])["rest"].tokens == result.tokens[cut:]


def test_an_engine_refuses_a_grammar_for_its_own_request_only(make_engine, run, greedy):
    bad = greedy("bad", [10], grammar=Grammar("regex", "(a"))
    results = run(make_engine(), [bad, greedy("good", [10])])
    assert results["bad"].last.error_code == "invalid_grammar"
    assert "unclosed" in (results["bad"].last.error or "")
    assert results["good"].last.finish_reason == "length"


def test_a_continuation_of_a_finished_answer_ends_at_once(make_engine, run, tokenizer):
    params = SamplingParams(grammar=Grammar("choice", '["yes"]'))
    done = tuple(tokenizer.encode("yes").ids)
    out = run(make_engine(), [GenerationRequest("a", (10,), params, TENANT, None, done)])["a"]
    assert out.tokens == []
    assert out.last.finish_reason == "stop"


def test_a_grammar_that_becomes_too_complex_ends_its_own_request(make_engine, run, greedy):
    schema = {
        "type": "object",
        "properties": {f"p{i}": {"type": "string", "pattern": "^(a|b)*c$"} for i in range(1000)},
    }
    wide = Grammar("json_schema", json.dumps(schema))
    check_grammar(wide)
    results = run(make_engine(), [greedy("bad", [10], grammar=wide), greedy("good", [10])])
    assert results["bad"].last.error_code == "grammar_failed"
    assert "items" in (results["bad"].last.error or "")
    assert results["good"].last.finish_reason == "length"


def test_choices_nested_beyond_the_parser_are_refused():
    with pytest.raises(GrammarInvalid):
        check_grammar(Grammar("choice", "[" * 100_000 + "]" * 100_000))


def test_a_grammar_that_takes_long_holds_nobody_up(demo, monkeypatch):
    """Others generate meanwhile; it is refused when its time is over."""
    begun, go_on = threading.Event(), threading.Event()
    compile_now = Grammars._compile

    def slowly(self, grammar):
        begun.set()
        go_on.wait(60)
        return compile_now(self, grammar)

    monkeypatch.setattr(Grammars, "_compile", slowly)
    engine = demo.engine()
    try:
        follows = SamplingParams(max_tokens=4, grammar=Grammar("regex", "(ab)+c"))
        plain = SamplingParams(max_tokens=4, ignore_eos=True)
        for name in ("in time", "late", "aborted", "behind"):
            engine.submit(GenerationRequest(name, (5, 6, 7), follows, TENANT))
        engine.submit(GenerationRequest("plain", (5, 6, 7), plain, TENANT))
        engine.abort("aborted")
        begun.wait(60)
        ended = {}

        def run_until(done):
            while not done():
                for out in engine.step():
                    if out.finish_reason is not None:
                        ended[out.request_id] = out

        run_until(lambda: ended)
        assert list(ended) == ["plain"]
        waiting = engine._compiling._waiting
        for name in ("late", "behind"):
            waiting[name] = replace(waiting[name], submitted=0.0)
        run_until(lambda: len(ended) == 3)
        assert ended["late"].error_code == "invalid_grammar"
        assert "takes more than 10 s to compile" in ended["late"].error
        # Others' grammars kept the threads from its own: another group may take it.
        assert ended["behind"].error_code == "overloaded"
        go_on.set()
        run_until(lambda: not engine.has_work())
        assert set(ended) == {"plain", "late", "behind", "in time"}
        assert ended["in time"].error is None
    finally:
        go_on.set()
        engine.close()
