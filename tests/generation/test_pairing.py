"""Pairs: the better score is chosen, texts differ, gaps are wide enough, seeds decide the rest."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.errors import AlignError
from align.generation import pairing
from align.generation.pairing import apply_rule, check_options, ranking

RULES = {
    "best_worst": pairing.best_worst,
    "best_random": pairing.best_random,
    "adjacent": pairing.adjacent,
    "random": pairing.random,
}
MESSAGES = [{"role": "user", "content": "Why?"}]


def group(*scored: tuple[str, float], prompt: Any = MESSAGES) -> dict[str, Any]:
    completions = [{"text": text, "score": score, "ended": True} for text, score in scored]
    return {"row": {"prompt": prompt, "task": "t"}, "completions": completions}


scored_texts = st.lists(
    st.tuples(st.sampled_from("abcdefg"), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])), max_size=8
)


@settings(max_examples=60, deadline=None)
@given(
    rule=st.sampled_from(list(RULES)),
    groups=st.lists(scored_texts, max_size=4),
    per_prompt=st.integers(1, 4),
    min_gap=st.sampled_from([0.0, 0.25, 0.6]),
    seed=st.integers(0, 3),
)
def test_what_holds_for_every_rule(rule, groups, per_prompt, min_gap, seed):
    made = [group(*scored, prompt=f"prompt {at}") for at, scored in enumerate(groups)]
    options = {"seed": seed, "pairs_per_prompt": per_prompt, "min_gap": min_gap}
    pairs = RULES[rule](made, **options)
    assert pairs == RULES[rule](made, **options)
    seen = set()
    for pair in pairs:
        number = int(pair["prompt"].split()[1])
        best: dict[str, float] = {}
        for text, score in groups[number]:
            best[text] = max(score, best.get(text, score))
        gap = best[pair["chosen"]] - best[pair["rejected"]]
        assert pair["margin"] == gap > 0
        assert gap >= min_gap
        assert pair["kind"] == rule
        seen.add((pair["prompt"], pair["chosen"], pair["rejected"]))
    assert len(seen) == len(pairs)
    for prompt in {pair["prompt"] for pair in pairs}:
        assert sum(pair["prompt"] == prompt for pair in pairs) <= per_prompt
    # A prompt's pairs do not depend on the prompts behind it.
    first = [pair for pair in pairs if pair["prompt"] == "prompt 0"]
    assert RULES[rule](made[:1], **options) == first


def texts(pairs: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs]


FIVE = group(("a", 1.0), ("b", 0.8), ("c", 0.5), ("d", 0.4), ("e", 0.0))


def test_best_worst_goes_inwards():
    found = pairing.best_worst([FIVE], seed=0, pairs_per_prompt=5)
    assert texts(found) == [("a", "e"), ("b", "d")]
    assert found[0]["chosen"] == [{"role": "assistant", "content": "a"}]
    assert found[0]["prompt"] == MESSAGES


def test_best_random_always_chooses_the_best():
    many = [FIVE] * 200
    found = texts(pairing.best_random(many, seed=1))
    assert {chosen for chosen, _ in found} == {"a"}
    assert {rejected for _, rejected in found} == {"b", "c", "d", "e"}


def test_adjacent_skips_to_the_next_that_is_far_enough():
    found = pairing.adjacent([FIVE], seed=0, pairs_per_prompt=9, min_gap=0.25)
    assert texts(found) == [("a", "c"), ("b", "c"), ("c", "e"), ("d", "e")]


def test_random_draws_all_pairs_alike():
    found = texts(pairing.random([FIVE] * 2000, seed=3))
    counts = {pair: found.count(pair) for pair in set(found)}
    assert len(counts) == 10
    assert all(140 < count < 260 for count in counts.values())  # 200 each, four deviations


def test_equal_texts_count_once_with_their_best_score():
    ranked = ranking(group(("a", 0.1), ("b", 0.5), ("a", 0.9))["completions"])
    assert [(item["text"], item["score"]) for item in ranked] == [("a", 0.9), ("b", 0.5)]
    assert pairing.best_worst([group(("a", 1.0), ("a", 0.0))], seed=0) == []


def test_plain_prompts_get_plain_answers():
    pair = pairing.best_worst([group(("a", 1.0), ("b", 0.0), prompt="Q:")], seed=0)[0]
    assert pair["prompt"] == "Q:"
    assert (pair["chosen"], pair["rejected"]) == ("a", "b")


def noisy(groups, *, seed=0, noise=0.1, contrast=1):
    return [{"prompt": "p", "chosen": "c", "rejected": "r", "kind": f"{seed} {noise} {contrast}"}]


def apply(rule, groups=(), **options):
    return apply_rule(rule, list(groups), seed=4, pairs_per_prompt=2, min_gap=0.3, options=options)


def test_a_rule_gets_the_shared_arguments_that_it_takes():
    assert apply(noisy, noise=0.5)[0]["kind"] == "4 0.5 1"
    assert texts(apply(pairing.best_worst, [FIVE])) == [("a", "e"), ("b", "d")]
    assert texts(apply(pairing.adjacent, [FIVE])) == [("a", "c"), ("b", "c")]


def test_repeated_pairs_are_dropped():
    def stutter(groups, *, seed):
        return noisy(groups) + noisy(groups)

    assert len(apply(stutter)) == 1


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (noisy, {"nois": 0.2}, "did you mean `noise`"),
        (noisy, {"zzz": 1}, "its options are noise, contrast"),
        (pairing.best_worst, {"zzz": 1}, "it has no options"),
        (pairing.best_worst, {"min_gap": 1}, "set `pairs.min_gap` instead"),
        (noisy, {"seed": 1}, "set `seed` instead"),
    ],
)
def test_unknown_options_are_refused(rule, options, message):
    with pytest.raises(AlignError, match=message) as caught:
        check_options("noisy", rule, options)
    assert f"pairs.rule_options.{next(iter(options))}" in str(caught.value)


def test_known_options_pass():
    check_options("noisy", noisy, {"noise": 0.2, "contrast": 3})


SONGS = [{"type": "function", "function": {"name": "songs"}}]
WEATHER = [{"type": "function", "function": {"name": "weather"}}]


def offering(tools: Any, *scored: tuple[str, float], prompt: Any = MESSAGES) -> dict[str, Any]:
    made = group(*scored, prompt=prompt)
    return made | {"row": made["row"] | {"tools": tools}}


@pytest.mark.parametrize("name", RULES)
def test_pairs_offer_the_tools_of_their_prompt(name):
    two = (("a", 1.0), ("b", 0.0))
    groups = [offering(SONGS, *two), offering(WEATHER, *two), offering(None, *two)]
    plain = offering(SONGS, *two, prompt="text")
    options = {"seed": 0, "pairs_per_prompt": 1, "min_gap": 0.0, "options": {}}
    pairs = apply_rule(RULES[name], [*groups, plain], **options)
    assert [pair.get("tools", "none") for pair in pairs] == [SONGS, WEATHER, None, "none"]


def test_a_rule_that_knows_no_tools_gets_them_or_is_told():
    def own(groups):
        answers = {"chosen": "a", "rejected": "b", "margin": 1.0, "kind": "own"}
        return [{"prompt": found["row"]["prompt"]} | answers for found in groups]

    options = {"seed": 0, "pairs_per_prompt": 1, "min_gap": 0.0, "options": {}}
    other = [{"role": "user", "content": "When?"}]
    (first, second) = apply_rule(own, [offering(SONGS), offering(None, prompt=other)], **options)
    assert (first["tools"], second["tools"]) == (SONGS, None)
    with pytest.raises(AlignError, match="comes with different ones"):
        apply_rule(own, [offering(SONGS), offering(WEATHER)], **options)
