"""The updates: exact at the start, nothing moves that must not, and a known optimum is reached."""

import json
import shutil
import signal

import pytest
import torch
from ppo_runs import figures, lines, make_trainer, merged, ppo_config, same, trained, weights
from torch.testing import assert_close

from align.errors import AlignError
from align.ppo.alarms import Alarm
from align.ppo.trainer import total_steps
from align.training.fitting import fit

slow = pytest.mark.slow


@pytest.fixture
def config(llama, tmp_path):
    return lambda **more: ppo_config(llama, tmp_path, **more)


SHAPES = {
    "plain": {},
    "value on the policy": {"value_model": "policy"},
    "full": {"lora": {"use_peft": False}, "trainer": {"learning_rate": 1e-3}},
    "full, value on the policy": {
        "lora": {"use_peft": False},
        "value_model": "policy",
        "trainer": {"learning_rate": 1e-3},
    },
    "dora": {"lora": {"use_dora": True}},
    "control tokens": {"lora": {"trainable_token_indices": "control"}},
    "saved embedding": {"lora": {"lora_modules_to_save": ["embed_tokens"]}},
    "several answers": {"generation": {"num_generations": 2}},
    "two passes": {"num_ppo_epochs": 2},
    "recomputed": {"trainer": {"gradient_checkpointing": True}},
    "by length": {"trainer": {"train_sampling_strategy": "group_by_length"}},
    "temperature": {"generation": {"temperature": 0.7}},
    "unfolded": {"generation": {"fold_adapter": False}},
    "all options": {
        "kl_target": 1.0,
        "kl_estimator": "k3",
        "cliprange_high": 0.28,
        "dual_clip": 3.0,
        "cliprange_value": None,
        "lam_value": 1.0,
        "lam_length_alpha": 0.5,
        "whiten_rewards": True,
        "missing_eos_score": -1.0,
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_begins_exactly_and_learns(config, shape):
    settings = config(**SHAPES[shape])
    trainer = make_trainer(settings)
    before = weights(trainer)
    fit(trainer, trainer.folder)
    folder = trainer.folder.path
    assert figures(folder, "objective/kl")[0] == 0.0
    assert figures(folder, "objective/kl_k3")[0] == 0.0
    trained_head = shape.startswith("full") or "tokens" in shape or "embedding" in shape
    for key in ("val/ratio", "val/ratio_min", "val/ratio_max"):
        assert figures(folder, key)[0] == pytest.approx(1.0, abs=1e-5 if trained_head else 0.0)
    assert figures(folder, "policy/approxkl_avg")[0] == pytest.approx(0.0, abs=1e-9)
    after = weights(trainer)
    policy = [n for n in after if n.startswith("policy.") and ".value." not in n]
    assert any(not torch.equal(before[name], after[name]) for name in policy)
    assert not torch.equal(before["value_head.weight"], after["value_head.weight"])
    assert trainer.state.global_step == 4
    rollouts = 4 // (2 * settings.num_ppo_epochs)
    assert len(trainer.history) == rollouts
    if rollouts == 2:
        assert trainer.history[1]["kl_k3"] > 0


def test_gradient_checkpointing_changes_no_weight_much(config):
    found = []
    for recompute in (False, True):
        settings = config(
            output_dir=f"{config().output_dir}-{recompute}",
            trainer={"gradient_checkpointing": recompute, "max_steps": 1},
        )
        found.append(weights(trained(settings)))
    first, second = found
    for name, weight in first.items():
        assert_close(second[name], weight, rtol=1e-4, atol=1e-5)


# --- nothing moves that must not -------------------------------------------------------------


@pytest.mark.parametrize("value_model", ["adapter", "policy"])
def test_no_learning_rate_no_change(config, value_model):
    trainer = make_trainer(
        config(value_model=value_model, trainer={"learning_rate": 1e-30}, value_learning_rate=1e-30)
    )
    before = weights(trainer)
    fit(trainer, trainer.folder)
    for name, weight in weights(trainer).items():
        assert_close(weight, before[name], rtol=0, atol=1e-20)
    assert trainer.history[1]["kl_k3"] == pytest.approx(0.0, abs=1e-12)


def test_each_group_has_its_own_learning_rate(config):
    trainer = make_trainer(config(trainer={"learning_rate": 1e-30}, value_learning_rate=1e-2))
    before = weights(trainer)
    fit(trainer, trainer.folder)
    after = weights(trainer)
    assert_close(after["value_head.weight"].norm() > 0, torch.tensor(True))
    assert any(".value." in name and not torch.equal(before[name], after[name]) for name in after)
    policy = [name for name in after if ".default." in name]
    assert policy
    for name in policy:
        assert_close(after[name], before[name], rtol=0, atol=1e-20)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [1e-30, 1e-2]
    default = make_trainer(config(output_dir=trainer.config.output_dir + "-default"))
    rates = [group["lr"] for group in default.create_optimizer().param_groups]
    assert rates == [1e-2, 2e-2]


@pytest.mark.parametrize("value_model", ["adapter", "policy"])
def test_critic_warm_up_leaves_the_policy_untouched(config, value_model):
    trainer = make_trainer(config(value_model=value_model, critic_warmup_steps=4))
    before = weights(trainer)
    fit(trainer, trainer.folder)
    after = weights(trainer)
    for name in after:
        policy = name.startswith("policy.") and ".value." not in name
        assert not policy or torch.equal(before[name], after[name])
    assert not torch.equal(before["value_head.weight"], after["value_head.weight"])
    assert trainer.history[1]["kl_k3"] == 0.0
    assert not figures(trainer.folder.path, "val/ratio")


def test_after_the_warm_up_the_policy_learns_from_a_ratio_of_1(config):
    trainer = trained(config(critic_warmup_steps=2))
    assert figures(trainer.folder.path, "val/ratio_max")[0] == 1.0
    assert len(figures(trainer.folder.path, "val/ratio_max")) == 2


@pytest.mark.parametrize("value_model", ["adapter", "policy"])
def test_target_kl_leaves_the_policy_alone_for_the_rest_of_a_rollout(config, value_model):
    """The first update of a rollout has ratio 1; the second sees what it did and stops the others."""
    settings = config(
        value_model=value_model, target_kl=1e-12, num_ppo_epochs=2, trainer={"max_steps": 8}
    )
    trainer = make_trainer(settings)
    seen = []
    step = trainer.training_step

    def watched(*given, **more):
        seen.append((trainer.state.global_step, weights(trainer)))
        return step(*given, **more)

    trainer.training_step = watched
    fit(trainer, trainer.folder)
    at = dict(seen)
    at[8] = weights(trainer)

    def moved(first, second, part):
        names = [n for n in at[first] if n.startswith("policy.") and ".value." not in n]
        names = names if part == "policy" else ["value_head.weight"]
        return any(not torch.equal(at[first][n], at[second][n]) for n in names)

    assert [moved(n, n + 1, "policy") for n in range(8)] == [
        True, True, False, False, True, True, False, False,
    ]  # fmt: skip
    assert all(moved(n, n + 1, "value") for n in range(8))
    left = figures(trainer.folder.path, "policy/left_alone")
    assert left == [0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]


@slow
def test_a_very_large_kl_coefficient_keeps_the_policy_at_its_reference(config):
    def distance(kl_coef: float) -> float:
        settings = config(
            output_dir=f"{config().output_dir}-{kl_coef}",
            kl_coef=kl_coef,
            whiten_advantages=False,
            reward_clip=1.0,
            num_mini_batches=1,
            cliprange_value=None,
            trainer={
                "per_device_train_batch_size": 16,
                "gradient_accumulation_steps": 1,
                "max_steps": 12,
                "learning_rate": 3e-3,
            },
        )
        return trained(settings).history[-1]["kl_k3"]

    assert distance(1000.0) < 0.1 * distance(0.0)


# --- what must happen ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("value_model", ["adapter", "policy"])
def test_the_share_of_a_letter_rises_to_its_optimum(config, value_model):
    """At temperature 1 this model's frozen norm and head let no token have more than about .55."""
    trainer = trained(
        config(
            value_model=value_model,
            scorer={"reward_funcs": {"test_codes": 0.0, "test_letters": 1.0}},
            kl_coef=0.0,
            reward_normalization="none",
            missing_eos_penalty=None,
            generation={"max_new_tokens": 8, "temperature": 0.5},
            trainer={
                "per_device_train_batch_size": 16,
                "gradient_accumulation_steps": 1,
                "max_steps": 240,
                "learning_rate": 1e-2,
            },
            num_mini_batches=4,
        )
    )
    scores = [one["score"] for one in trainer.history]
    assert scores[0] < 0.1
    assert scores[-1] > 0.9


def test_the_adaptive_coefficient_follows_the_observed_kl(config):
    trainer = trained(config(kl_target=1e-6, kl_horizon=16, trainer={"max_steps": 6}))
    used = [one["kl_coef"] for one in trainer.history]
    assert used[0] == 0.05
    assert used[1] == pytest.approx(0.05 * (1 - 0.2 * 8 / 16))  # no KL at all at first
    sign = 1 if trainer.history[1]["kl"] > 1e-6 else -1
    assert used[2] == pytest.approx(used[1] * (1 + sign * 0.2 * 8 / 16))


def test_samples_are_written_every_so_many_rollouts(config):
    trainer = trained(config(sample_rollouts=2, trainer={"max_steps": 6}))
    rows = lines(trainer.folder.path, "samples.jsonl")
    assert [row["rollout"] for row in rows] == [0] * 8 + [2] * 8
    assert rows[0]["prompt"][0]["role"] == "user"
    assert {"completion", "score", "reward", "kl", "ended"} <= rows[0].keys()
    assert all(row["kl"] == 0.0 for row in rows[:8])


def test_answers_with_line_separators_stay_one_line_of_samples(config):
    """JSON leaves U+2028 and U+0085 in a text as they are, and `str.splitlines` would split there."""
    trainer = make_trainer(config(trainer={"max_steps": 4}))
    draw = trainer.collector.draw

    def drawn(*given):
        found = draw(*given)
        for episode in found:
            episode.text = "a\u2028b\x85c"
        return found

    trainer.collector.draw = drawn
    fit(trainer, trainer.folder)
    rows = (trainer.folder.path / "samples.jsonl").read_text().split("\n")[:-1]
    assert [json.loads(row)["rollout"] for row in rows] == [0] * 8 + [1] * 8


def test_what_is_logged_and_noted(config):
    trainer = trained(config())
    trainer.close()
    wanted = {
        "objective/scores", "objective/kl", "objective/kl_k3", "objective/entropy",
        "policy/clipfrac_avg", "policy/approxkl_avg", "val/ratio_min", "val/ratio_max",
        "val/explained_variance", "completions/mean_length", "completions/eos_rate",
        "completions/unique_rate", "loss/policy_avg", "loss/value_avg", "grad_norm/policy",
        "grad_norm/value", "time/generate", "time/score", "time/update", "episode",
    }  # fmt: skip
    assert wanted <= set().union(*lines(trainer.folder.path))
    noted = json.loads((trainer.folder.path / "summary.json").read_text())
    assert noted["episodes"] == 16
    assert noted["steps"] == 4
    assert noted["tokens"] == sum(one["tokens"] for one in trainer.history)


# --- alarms ----------------------------------------------------------------------------------


def test_an_alarm_that_may_stop_keeps_the_last_good_policy(config):
    """The KL limit is passed by the first updates: the rollout before them had no alarm."""
    more = {"alarms": {"kl_per_token": 1e-9, "patience": 1, "stop_on": ["kl"]}}
    trainer = make_trainer(config(**merged(more, {"trainer": {"max_steps": 12}})))
    before = weights(trainer)
    fit(trainer, trainer.folder)
    assert trainer.halted == "kl"
    assert len(trainer.history) == 2
    assert trainer.state.global_step == 2
    assert not same(before, weights(trainer))
    trainer.close()
    policy = {n: w for n, w in weights(trainer).items() if n.startswith("policy.")}
    assert all(torch.equal(w, before[n]) for n, w in policy.items() if ".default." in n)
    noted = json.loads((trainer.folder.path / "summary.json").read_text())
    assert noted["stopped_by"] == "kl"
    assert noted["alarms"]["kl"] == 1
    assert noted["kept_policy"] == "of rollout 0"
    said = {line["alarm"]: line for line in lines(trainer.folder.path) if "alarm" in line}
    assert "kl_coef" in said["kl"]["remedy"]


def ringing(monkeypatch, **rollouts: int) -> None:
    """Each alarm rings from a rollout on."""

    def alarms(history, _):
        number = history[-1]["rollout"]
        return [Alarm(name, "why", "way out") for name, at in rollouts.items() if number >= at]

    monkeypatch.setattr("align.ppo.trainer.alarms", alarms)


def test_a_standing_alarm_that_may_not_stop_keeps_no_policy_from_being_good(config, monkeypatch):
    """The policy of the third rollout comes back, not the untouched one from before the first alarm."""
    ringing(monkeypatch, critic=0, kl=3)
    trainer = make_trainer(config(alarms={"stop_on": ["kl"]}, trainer={"max_steps": 12}))
    seen = []
    draw = trainer.collector.draw
    trainer.collector.draw = lambda *given: (
        seen.append(weights(trainer, ".default.")) or draw(*given)
    )
    fit(trainer, trainer.folder)
    trainer.close()
    assert len(seen) == 4
    assert same(weights(trainer, ".default."), seen[2])
    assert not same(seen[2], seen[3])
    noted = json.loads((trainer.folder.path / "summary.json").read_text())
    assert noted["kept_policy"] == "of rollout 2"
    assert noted["alarms"] == {"critic": 0, "kl": 3}


def test_an_alarm_before_any_good_policy_is_said(config, monkeypatch):
    ringing(monkeypatch, kl=0)
    trainer = make_trainer(config(alarms={"stop_on": ["kl"]}))
    before = weights(trainer, ".default.")
    fit(trainer, trainer.folder)
    trainer.close()
    assert same(weights(trainer, ".default."), before)
    noted = json.loads((trainer.folder.path / "summary.json").read_text())
    assert noted["stopped_by"] == "kl"
    assert noted["kept_policy"] == "the last one: none was there before the alarm"


def test_the_good_policy_is_in_the_checkpoint(config, monkeypatch):
    """A run that goes on from a checkpoint can still go back to a policy from before it."""
    ringing(monkeypatch, kl=2)
    more = {"alarms": {"stop_on": ["kl"]}, "trainer": {"max_steps": 12, "save_steps": 1}}
    whole = trained(config(**more))
    part = config(**more, output_dir=whole.config.output_dir + "-part")
    first = make_trainer(part)
    crash(first, "draw", 3)
    with pytest.raises(Crash):
        fit(first, first.folder)
    second = trained(part)
    for trainer in (whole, second):
        trainer.close()
    assert second.folder.attempt == 2
    assert second.good_rollout == whole.good_rollout == 1
    assert same(weights(whole), weights(second))


def test_an_alarm_alone_stops_nothing(config):
    trainer = trained(config(alarms={"kl_per_token": 1e-9, "patience": 1}))
    assert trainer.halted is None
    assert trainer.raised.keys() >= {"kl"}
    assert trainer.state.global_step == 4


def test_a_policy_that_never_ends_its_turn_is_reported(config):
    trainer = trained(config(generation={"max_new_tokens": 1}, alarms={"patience": 1}))
    assert trainer.history[-1]["eos_rate"] <= 0.2
    if trainer.history[-1]["eos_rate"] == 0:
        assert "eos" in trainer.raised


# --- sizes -----------------------------------------------------------------------------------


def test_steps_follow_from_episodes_passes_or_steps(config):
    base = {"trainer": {"max_steps": -1}}
    assert (
        total_steps(config(**base), 8) == 2
    )  # one pass of 8 prompts is one rollout of two updates
    assert total_steps(config(**base), 9) == 4
    assert total_steps(config(**base, generation={"num_generations": 4}), 8) == 8
    assert total_steps(config(**base, num_ppo_epochs=3), 8) == 6
    assert total_steps(config(**base, total_episodes=17), 8) == 6
    assert total_steps(config(total_episodes=17), 8) == 6
    assert total_steps(config(trainer={"max_steps": 5}), 8) == 5
    assert total_steps(config(trainer={"max_steps": -1, "num_train_epochs": 2.5}), 8) == 6


def test_answers_that_do_not_fill_a_rollout_are_refused(llama, tmp_path):
    with pytest.raises(AlignError, match="cannot be split"):
        make_trainer(ppo_config(llama, tmp_path, generation={"num_generations": 3}))


# --- going on --------------------------------------------------------------------------------


class Crash(Exception):
    pass


def crash(trainer, where: str, number: int):
    """Let the trainer raise in the middle of its `number`th call of a method."""
    owner = trainer.collector if where in ("draw", "_look") else trainer
    original, calls = getattr(owner, where), [0]

    def failing(*given, **more):
        found = original(*given, **more)
        calls[0] += 1
        if calls[0] == number:
            raise Crash
        return found

    setattr(owner, where, failing)


def test_a_run_that_fails_gives_the_signals_back(config):
    """Its callback holds SIGTERM and Ctrl-C back until a step ends, which no step does any more."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    trainer = make_trainer(config())
    crash(trainer, "training_step", 2)
    with pytest.raises(Crash):
        fit(trainer, trainer.folder)
    assert [signal.getsignal(number) for number in numbers] == before


CRASHES = [("training_step", 7), ("draw", 2), ("_look", 3), ("training_step", 17)]
"""In the middle of a rollout's updates, while drawing, before the first update, in a later pass."""


@pytest.mark.parametrize(
    ("shape", "where", "number"),
    [
        pytest.param(shape, *at, marks=[] if (shape, at) == ("plain", CRASHES[0]) else slow)
        for shape in ("plain", "full", "value on the policy")
        for at in CRASHES
    ],
)
def test_a_run_goes_on_bit_by_bit(config, shape, where, number):
    """Saved after every third step, so that checkpoints lie inside rollouts and their passes."""
    more = merged(
        SHAPES[shape],
        {
            "num_ppo_epochs": 2,
            "kl_target": 0.5,
            "trainer": {"max_steps": 12, "save_steps": 3, "lr_scheduler_type": "linear"},
        },
    )
    whole = trained(config(**more))
    part = config(**more, output_dir=whole.config.output_dir + "-part")
    first = make_trainer(part)
    crash(first, where, number)
    with pytest.raises(Crash):
        fit(first, first.folder)
    second = trained(part)
    assert second.folder.attempt == 2
    assert same(weights(whole), weights(second))
    clocks = {"generate_seconds", "score_seconds", "update_seconds"}

    def told(trainer):
        return [{k: v for k, v in one.items() if k not in clocks} for one in trainer.history]

    assert json.dumps(told(whole)) == json.dumps(told(second))
    assert whole.kl_coef == second.kl_coef
    one, other = (lines(t.folder.path, "samples.jsonl") for t in (whole, second))
    assert one == other
    for mine, its in zip(
        whole.optimizer.state_dict()["state"].values(),
        second.optimizer.state_dict()["state"].values(),
        strict=True,
    ):
        assert all(torch.equal(mine[key], its[key]) for key in mine)
    shutil.rmtree(whole.folder.path)
