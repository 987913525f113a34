"""Rollouts: whose turn it is, who learns from what, and what becomes of the scores."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ppo_runs import ppo_config
from torch.testing import assert_close

from align.errors import AlignError, Problem
from align.generation.answers import Prompt
from align.generation.scoring import token_logprobs
from align.models.tokenizer import load_tokenizer
from align.ppo import rollout
from align.ppo.casting import cast_roles
from align.ppo.experience import Episode, Experience, load_experience, rows_of
from align.ppo.rollout import Collector, gathered_from, prompt_places, summary, update_plan

T = torch.tensor

# --- prompts ---------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(1, 9), st.booleans(), st.integers(0, 1000))
def test_every_pass_asks_every_prompt_once(prompts, per_rollout, shuffled, seed):
    stream = []
    number = 0
    while len(stream) < 3 * prompts:
        stream += prompt_places(number, per_rollout, prompts, seed, shuffled=shuffled)
        number += 1
    assert [place for place, _ in stream] == list(range(len(stream)))
    for first in range(0, 3 * prompts, prompts):
        rows = [row for _, row in stream[first : first + prompts]]
        assert sorted(rows) == list(range(prompts))
        if not shuffled:
            assert rows == list(range(prompts))


def test_the_order_follows_from_the_seed_and_changes_with_the_pass():
    def order(number, seed):
        return [row for _, row in prompt_places(number, 12, 12, seed, shuffled=True)]

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)


# --- minibatches -----------------------------------------------------------------------------


@st.composite
def shapes(draw):
    minibatches, processes = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    micro, accumulation = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    count = minibatches * processes * micro * accumulation
    lengths = draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    return lengths, minibatches, processes, micro, accumulation


@settings(max_examples=50, deadline=None)
@given(shapes(), st.booleans())
def test_a_plan_is_a_partition_into_equal_parts(shape, by_length):
    lengths, minibatches, processes, micro, accumulation = shape
    plan = update_plan(
        lengths,
        minibatches=minibatches,
        processes=processes,
        micro_batch=micro,
        seed=(1, 2, 3),
        by_length=by_length,
    )
    assert len(plan) == minibatches
    assert {len(mini) for mini in plan} == {processes}
    assert {len(share) for mini in plan for share in mini} == {accumulation}
    assert {len(part) for mini in plan for share in mini for part in share} == {micro}
    places = [place for mini in plan for share in mini for part in share for place in part]
    assert sorted(places) == list(range(len(lengths)))
    if by_length:
        for mini in plan:
            shares = [[lengths[place] for part in share for place in part] for share in mini]
            dealt = [length for card in zip(*shares, strict=True) for length in card]
            assert dealt == sorted(dealt)


@pytest.mark.parametrize("by_length", [False, True])
def test_minibatches_do_not_depend_on_the_number_of_processes(by_length):
    lengths = [n % 7 + 1 for n in range(24)]

    def minibatches(processes, micro, seed=(1, 0, 0)):
        plan = update_plan(
            lengths,
            minibatches=3,
            processes=processes,
            micro_batch=micro,
            seed=seed,
            by_length=by_length,
        )
        return [sorted(p for share in mini for part in share for p in part) for mini in plan]

    assert minibatches(1, 4) == minibatches(2, 2) == minibatches(4, 1)
    assert minibatches(1, 4) != minibatches(1, 4, seed=(1, 0, 1))
    assert minibatches(1, 4) != minibatches(1, 4, seed=(1, 1, 0))


def test_processes_get_like_loads_where_minibatches_are_sorted_by_length():
    """In blocks the last of four processes would get all the long answers; every micro-batch waits for the slowest."""
    lengths = list(range(1, 65))
    (mini,) = update_plan(
        lengths, minibatches=1, processes=4, micro_batch=4, seed=(1, 0, 0), by_length=True
    )
    loads = [[sum(lengths[place] for place in part) for part in share] for share in mini]
    for micro in zip(*loads, strict=True):
        assert max(micro) - min(micro) <= 3 * 4
    spread = [max(part) - min(part) for share in mini for part in share]
    assert max(spread) <= 3 * 4


# --- what one process cannot do -----------------------------------------------------------------


class World:
    """`gather_object` as one of two processes sees it, while the other one's items are given."""

    def __init__(self, monkeypatch, *others) -> None:
        self.others, self.told = list(others), []
        monkeypatch.setattr(rollout, "world_size", lambda: 2)
        monkeypatch.setattr(rollout, "gather_object", self.gather)

    def gather(self, items):
        self.told.append(items)
        return [*items, *self.others.pop(0)]


def test_items_are_gathered_where_nothing_fails(monkeypatch):
    World(monkeypatch, [()], [3.0])
    assert gathered_from(lambda: [1.0, 2.0]) == [1.0, 2.0, 3.0]


def test_a_process_that_fails_tells_the_others_and_raises_its_own_error(monkeypatch):
    def refuse():
        raise AlignError(Problem("raised OSError", "reward function `mine`"))

    world = World(monkeypatch, [()])
    with pytest.raises(AlignError, match="reward function `mine`: raised OSError"):
        gathered_from(refuse)
    assert world.told == [[(Problem("raised OSError", "reward function `mine`"),)]]

    def crash():
        raise ZeroDivisionError("by zero")

    world = World(monkeypatch, [()])
    with pytest.raises(ZeroDivisionError):
        gathered_from(crash)
    assert "ZeroDivisionError: by zero" in world.told[0][0][0].message


def test_the_others_raise_what_they_were_told_and_wait_for_nothing_more(monkeypatch):
    problem = Problem("raised OSError", "reward function `mine`")
    world = World(monkeypatch, [(problem,)])
    with pytest.raises(AlignError) as error:
        gathered_from(lambda: [1.0])
    assert error.value.problems == (problem,)
    assert len(world.told) == 1


# --- experience ------------------------------------------------------------------------------


def test_values_of_tokens_become_rows():
    found = rows_of([T([1.0, 2.0, 3.0]), T([4.0])], [2, 1, 1], 3)
    assert_close(found, T([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0], [4.0, 0.0, 0.0]]))


def experience(scores, ended, texts=None, *, gap=0.0) -> Experience:
    lengths = [2 + n % 2 for n in range(len(scores))]
    mask = (torch.arange(3) < T(lengths)[:, None]).float()
    episodes = [
        Episode(n, [1, 2], [7] * length, end, (texts or {}).get(n, f"text {n}"))
        for n, (length, end) in enumerate(zip(lengths, ended, strict=True))
    ]
    logprobs = -torch.ones(mask.shape) * mask
    return Experience(
        3,
        episodes,
        mask=mask,
        logprobs=logprobs,
        reference=(logprobs - gap) * mask,
        entropy=mask * 0.5,
        values=torch.zeros(mask.shape),
        scores=T(scores),
    )


def test_a_rollout_comes_back_from_a_checkpoint_as_it_was(tmp_path):
    assert load_experience(tmp_path) is None
    before = experience([1.0, 2.0], [True, False], {0: "grüße \u2028 \x00"}, gap=0.1)
    before.save(tmp_path)
    after = load_experience(tmp_path)
    assert after.episodes == before.episodes
    assert after.number == 3
    for name in ("mask", "logprobs", "reference", "entropy", "values", "scores", "returns"):
        assert torch.equal(getattr(after, name), getattr(before, name))


def collector(config, **more):
    """A collector without models: only what estimates."""
    made = object.__new__(Collector)
    made.config, made.reward_mean, made.reward_deviation = config, 0.0, 1.0
    for name, value in more.items():
        setattr(made, name, value)
    return made


@pytest.fixture
def estimated(llama, tmp_path):
    def estimated(e: Experience, mean=0.0, deviation=1.0, kl_coef=0.0, **more):
        config = ppo_config(llama, tmp_path, **more)
        one = collector(config, reward_mean=mean, reward_deviation=deviation)
        return one.estimate(e, kl_coef)

    return estimated


ENDED = [True, False, True, False]
SCORES = [1.0, 1.0, -30.0, 30.0]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, [1.0, 0.0, -10.0, 9.0]),
        ({"missing_eos_penalty": 0.25}, [1.0, 0.75, -10.0, 9.75]),
        ({"missing_eos_penalty": None}, [1.0, 1.0, -10.0, 10.0]),
        ({"missing_eos_score": -1.0}, [1.0, -1.0, -10.0, -1.0]),
        ({"reward_clip": 5.0, "missing_eos_penalty": None}, [1.0, 1.0, -5.0, 5.0]),
        ({"reward_clip": None, "missing_eos_penalty": None}, SCORES),
    ],
)
def test_unfinished_answers_and_the_clip(estimated, settings, wanted):
    e = experience(SCORES, ENDED)
    found = estimated(e, **settings)
    assert_close(e.rewards, T(wanted))
    assert found["clipped_scores"] == (0.0 if settings.get("reward_clip", 10.0) is None else 0.5)
    assert found["eos_rate"] == 0.5
    assert found["score"] == pytest.approx(0.5)
    assert found["reward"] == pytest.approx(sum(wanted) / 4)


def test_scores_are_normalized_before_they_are_clipped(estimated):
    e = experience([5.0, 1.0], [True, True])
    estimated(e, mean=1.0, deviation=2.0, reward_clip=1.5)
    assert_close(e.rewards, T([1.5, 0.0]))


def test_a_policy_that_never_ends_a_turn_is_counted(estimated):
    found = estimated(experience([1.0, 1.0], [False, False]))
    assert found["eos_rate"] == 0.0
    assert found["reward"] == 0.0


def test_advantages_and_returns_by_hand(estimated):
    e = experience([1.0, 2.0], [True, True], gap=0.5)
    # No values, gamma 1, lambda 1: what is still to come. -0.1 * 0.5 at each token.
    found = estimated(e, kl_coef=0.1, lam=1.0, whiten_advantages=False)
    wanted = T([[0.9, 0.95, 0.0], [1.85, 1.9, 1.95]])
    assert_close(e.advantages, wanted)
    assert_close(e.returns, wanted)
    assert found["kl"] == pytest.approx(1.25)
    assert found["kl_coef"] == 0.1
    assert found["kl_k3"] == pytest.approx(2.5 * (math.exp(-0.5) - 0.5))
    assert found["kl_per_token"] == pytest.approx(math.exp(-0.5) - 0.5)
    assert found["entropy"] == pytest.approx(0.5)
    assert found["length"] == 2.5
    assert found["tokens"] == 5.0


def test_values_may_have_a_lambda_of_their_own(estimated):
    one, other, both = (experience([1.0, 2.0], [True, True], gap=0.5) for _ in range(3))
    plain = {"whiten_advantages": False, "kl_coef": 0.1}
    estimated(one, lam=0.3, **plain)
    estimated(other, lam=0.9, **plain)
    estimated(both, lam=0.3, lam_value=0.9, **plain)
    assert_close(both.advantages, one.advantages)
    assert_close(both.returns, other.returns)


@pytest.mark.parametrize(
    "settings",
    [
        {"gamma": 0.5},
        {"lam": 0.5},
        {"lam_length_alpha": 1.0},
        {"whiten_rewards": True},
        {"whiten_advantages": False},
        {"kl_estimator": "k3"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_of_the_advantages(estimated, settings):
    one, other = (experience([1.0, 2.0, 0.0, 4.0], [True] * 4, gap=0.5) for _ in "ab")
    estimated(one, kl_coef=0.1)
    estimated(other, kl_coef=0.1, **settings)
    assert (one.advantages - other.advantages).abs().max() > 1e-3
    assert float(one.advantages.sum()) == pytest.approx(0, abs=1e-4)


def test_answers_that_are_the_same_are_counted():
    e = experience([1.0] * 4, [True] * 4, {0: "same", 1: "same", 2: "same"})
    e.rewards, e.returns = e.scores, e.values
    assert summary(e, 0.0)["unique_rate"] == 0.5


# --- the first rollout fixes the scale -------------------------------------------------------


@pytest.fixture
def started(llama, tmp_path):
    def started(scores, **more):
        config = ppo_config(llama, tmp_path, **more)
        tokenizer = load_tokenizer(config.model)
        prompts = [Prompt(0, [0, 2, 40], {"prompt": "x"})]
        roles = cast_roles(config, tokenizer, prompts)
        made = Collector(config, roles, tokenizer, prompts, None, rank=0)
        made._start([Episode(0, [0, 2, 40], [50, 4], True, "")], T(scores))
        return made

    return started


def test_the_scale_is_that_of_the_first_scores(started):
    made = started([1.0, 3.0])
    assert made.reward_mean == 2.0
    assert made.reward_deviation == pytest.approx(math.sqrt(2))
    made = started([1.0, 3.0], reward_normalization="none")
    assert (made.reward_mean, made.reward_deviation) == (0.0, 1.0)


@pytest.mark.parametrize("scores", [[0.0, 0.0, 0.0], [0.5]])
def test_equal_first_scores_have_no_scale(started, scores):
    """A rare reward that nobody earned at first must not be blown up later, one episode is no NaN."""
    assert started(scores).reward_deviation == 1.0


def test_a_reward_that_is_rare_at_first_is_capped_by_the_clip(started, estimated):
    """One right answer in four hundred: every later one counts `reward_clip`, half an answer as much as a whole."""
    made = started([0.0] * 399 + [1.0])
    assert made.reward_deviation == pytest.approx(0.05)
    e = experience([1.0, 0.6, 0.0, 1.0], [True] * 4)
    found = estimated(e, mean=made.reward_mean, deviation=made.reward_deviation)
    assert e.rewards.tolist() == pytest.approx([10.0, 10.0, -0.05, 10.0])
    assert found["clipped_scores"] == 0.75


# --- drawing ---------------------------------------------------------------------------------


@pytest.fixture
def drawn(llama, tmp_path):
    def drawn(number=0, episodes=8, **more):
        config = ppo_config(llama, tmp_path, **more)
        tokenizer = load_tokenizer(config.model)
        from align.generation.answers import load_prompts

        prompts = load_prompts(config.data, tokenizer)
        torch.manual_seed(0)
        roles = cast_roles(config, tokenizer, prompts)

        def scorer(found):
            return [float(len(e.text)) for e in found]

        made = Collector(config, roles, tokenizer, prompts, scorer, rank=0)
        return made, made.collect(number, episodes, 0.1)

    return drawn


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_what_is_collected_are_the_model_s_own_numbers(drawn, temperature):
    more = {"generation": {"temperature": temperature, "num_generations": 2}}
    made, (e, found) = drawn(**more)
    assert len(e.episodes) == 8
    assert [one.prompt for one in e.episodes[::2]] == [one.prompt for one in e.episodes[1::2]]
    assert len({one.prompt for one in e.episodes}) == 4
    own = token_logprobs(
        made.roles.policy,
        [one.prompt_ids for one in e.episodes],
        [one.completion_ids for one in e.episodes],
        temperature=temperature,
    )
    wanted = rows_of([T(row) for row in own], [len(row) for row in own], e.mask.shape[1])
    assert_close(e.logprobs, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(e.logprobs, e.reference)
    assert found["kl"] == found["kl_k3"] == 0.0
    assert e.scores.tolist() == [float(len(one.text)) for one in e.episodes]
    for one in e.episodes:
        assert one.ended == (one.completion_ids[-1] in made.stops)
        assert 1 <= len(one.completion_ids) <= 8


def test_a_rollout_can_be_drawn_again_and_every_rollout_is_another(drawn):
    _, (first, _) = drawn(0)
    _, (again, _) = drawn(0, generation={"generation_batch_size": 3})
    _, (next_one, _) = drawn(1)
    assert [e.completion_ids for e in first.episodes] == [e.completion_ids for e in again.episodes]
    assert [e.completion_ids for e in first.episodes] != [
        e.completion_ids for e in next_one.episodes
    ]
    _, (other, _) = drawn(0, trainer={"seed": 7})
    assert [e.completion_ids for e in first.episodes] != [e.completion_ids for e in other.episodes]


def test_a_score_that_is_no_number_names_the_row(llama, tmp_path):
    made = collector(
        ppo_config(llama, tmp_path),
        scorer=lambda episodes: [1.0, float("nan")],
        prompts=[Prompt(n, [1], {}) for n in range(9)],
        roles=type("Roles", (), {"shares_reward": False})(),
    )
    episodes = [Episode(5, [1], [2], True, ""), Episode(8, [1], [2], True, "")]
    with pytest.raises(AlignError, match="no finite number") as error:
        made._scores(episodes, [[0], [1]])
    assert "row 9" in str(error.value)
