"""The world: unique words, exact splits, items that round-trip, answers of known quality."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.tiny.lexicon import CAPITALS, FACTS, ISLES, JOBS, LISTABLE, TOOLS, UNSAFE
from align.tiny.world import (
    SPLITS,
    TASKS,
    Item,
    draw_item,
    make_items,
    wrong_answer,
)

seeds = st.integers(min_value=0, max_value=2**32)


def test_words_are_unique() -> None:
    assert len(set(LISTABLE)) == len(LISTABLE)
    assert len(set(ISLES + CAPITALS)) == len(ISLES) + len(CAPITALS)


def test_every_isle_has_every_fact_and_every_tool_its_jobs() -> None:
    assert all(set(facts) == set(FACTS[ISLES[0]]) for facts in FACTS.values())
    assert len(JOBS) == 120
    assert set(Counter(JOBS.values()).values()) == {12}
    assert not set(JOBS) & set(UNSAFE)
    tools = set(TOOLS)
    assert not any(tools & set(f"{verb} {thing}".split()) for verb, thing in JOBS)


@given(seeds)
@settings(max_examples=200, deadline=None)
def test_items_round_trip(seed: int) -> None:
    item = draw_item(random.Random(seed))
    again = Item.from_json(item.to_json())
    assert again == item
    assert (again.prompt, again.key, again.full) == (item.prompt, item.key, item.full)


@given(seeds)
@settings(max_examples=300, deadline=None)
def test_a_near_miss_is_never_the_truth(seed: int) -> None:
    rng = random.Random(seed)
    item = draw_item(rng)
    bare, full = wrong_answer(item, rng)
    assert bare != item.bare
    assert full != item.full


def test_small_sets_are_split_in_exact_shares() -> None:
    counts = Counter(Item("howto", {"verb": verb, "thing": thing}).split for verb, thing in JOBS)
    assert counts == {"sft": 42, "pref": 36, "rl": 18, "val": 6, "test": 18}


def test_no_composition_is_in_two_splits() -> None:
    keys = {
        split: {(item.task, item.key) for item in make_items(split, 300, 5)} for split in SPLITS
    }
    for split in SPLITS:
        for other in SPLITS:
            assert split == other or not keys[split] & keys[other]


def test_prompts_are_distinct_and_depend_on_the_seed_only() -> None:
    items = make_items("rl", 200, 3)
    assert len({item.prompt for item in items}) == 200
    assert make_items("rl", 200, 3) == items
    assert make_items("rl", 200, 4) != items
    assert {item.task for item in items} == set(TASKS)


def test_unknown_or_exhausted_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown split"):
        make_items("train", 1, 0)
