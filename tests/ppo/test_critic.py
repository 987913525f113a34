"""A full reward model under the value's adapter: the reward without it, the value with it; its weights stay."""

import json
import shutil

import pytest
import torch
from ppo_runs import make_trainer, ppo_config, same, trained, weights
from safetensors.torch import load_file
from torch.testing import assert_close

from align.config.sections import ModelSection
from align.generation.answers import Prompt
from align.models.identity import look_at
from align.models.loading import load_reward_base
from align.models.quick_lora import QuickLinear
from align.models.tokenizer import load_tokenizer
from align.ppo.casting import cast_roles, make_scorer, say_casting
from align.ppo.experience import Episode
from align.ppo.forward import Forward
from align.ppo.scoring import reward_model_scorer
from align.ppo.state import WEIGHTS
from align.training.fitting import fit

PROMPTS = [Prompt(0, [0, 40, 50, 60], {"prompt": []}), Prompt(1, [0, 70, 80], {"prompt": []})]


@pytest.fixture(scope="module")
def reward_model(make_llama, tokenizer, tmp_path_factory):
    """What `align reward` with `use_peft: false` leaves, over a base of its own (another depth than the policy)."""
    base = make_llama(seed=7, layers=3)
    torch.manual_seed(3)
    section = ModelSection(model_name_or_path=str(base))
    model = load_reward_base(section, look_at(str(base)), train_base=True)
    folder = tmp_path_factory.mktemp("reward")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(llama, tmp_path, reward_model):
    def config(**more):
        scorer = {"reward_model": str(reward_model), "reward_funcs": {}}
        return ppo_config(llama, tmp_path, **{"scorer": scorer, **more})

    return config


def cast(config):
    torch.manual_seed(0)
    return cast_roles(config, load_tokenizer(config.model), [])


def frozen(trainer_or_roles):
    """Every weight under the value's adapter, by name: the reward model's."""
    value = getattr(trainer_or_roles, "roles", trainer_or_roles).value
    return {n: p.detach().clone() for n, p in value.named_parameters() if "lora_" not in n}


def closed_episodes(tokenizer):
    """Episodes that end their turn, which is where a reward is read."""
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    answers = [[120, 130, end], [140, end]]
    return [
        Episode(n, prompt.ids, answer, True, "")
        for n, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True))
    ]


def last_states(roles, role, episodes):
    forward = Forward(roles.policy, 1.0)
    flat = forward.batch(episodes, roles.device)
    with torch.no_grad(), roles.playing(role) as model:
        return forward.hidden(model, flat)[flat.last]


def test_its_scores_are_those_of_the_separate_scorer(config, tokenizer, reward_model):
    roles = cast(config())
    assert roles.reward_on_value
    assert roles.shares_reward
    assert make_scorer(config(), roles, PROMPTS, tokenizer) is None
    episodes = closed_episodes(tokenizer)
    wanted = torch.tensor(reward_model_scorer(str(reward_model), PROMPTS, tokenizer, 2)(episodes))
    found = roles.rewards(last_states(roles, "reward", episodes))
    assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert abs(wanted[0] - wanted[1]) > 1e-2
    with torch.no_grad():  # whatever the value and the policy learn
        for name, parameter in roles.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    assert torch.equal(roles.rewards(last_states(roles, "reward", episodes)), found)
    moved = last_states(roles, "value", episodes) - last_states(roles, "reward", episodes)
    assert moved.abs().max() > 1e-2


def test_the_value_begins_as_the_normalized_reward_model(config, tokenizer):
    roles = cast(config())
    roles.start_value_from_reward(mean=0.3, deviation=2.0, weight=1.5)
    episodes = closed_episodes(tokenizer)
    rewards = roles.rewards(last_states(roles, "reward", episodes))
    values = roles.values(last_states(roles, "value", episodes))
    assert_close(values, (1.5 * rewards - 0.3) / 2.0, rtol=1e-4, atol=1e-4)


def test_what_is_trained_is_its_adapter_and_the_head(config):
    roles = cast(config())
    assert not any(p.requires_grad for n, p in roles.value.named_parameters() if "lora_" not in n)
    value = {id(p) for p in roles.value_parameters()}
    names = {n for n, p in roles.named_parameters() if id(p) in value}
    assert {n for n in names if not n.startswith("value.")} == {
        "value_head.weight",
        "value_head.bias",
    }
    assert all("lora_" in n for n in names if n.startswith("value."))
    assert not any("score" in n for n in names)
    assert roles.trained_state().keys() == names | {
        n for n, p in roles.named_parameters() if n.startswith("policy.") and p.requires_grad
    }
    for model in (roles.policy, roles.value):
        assert any(isinstance(module, QuickLinear) for module in model.modules())


def test_no_weight_of_the_reward_model_changes_and_the_value_learns(config, reward_model):
    trainer = make_trainer(config())
    before, started = frozen(trainer), weights(trainer)
    fit(trainer, trainer.folder)
    after = weights(trainer)
    assert same(before, frozen(trainer))
    on_disk = load_file(reward_model / "model.safetensors")
    for name, weight in before.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        assert torch.equal(weight, on_disk[plain]), name
    for part in ("policy.", "value.", "value_head."):
        moved = [n for n in after if n.startswith(part) and not torch.equal(started[n], after[n])]
        assert moved, part
    assert trainer.history[0]["kl_k3"] == 0.0


def test_the_first_values_are_the_reward_model_s(config):
    """Of every answer's last token, which a value is read in front of."""
    trainer = trained(config(trainer={"max_steps": 1}))
    e = trainer.experience
    last = (e.mask.sum(1) - 1).long()
    deviation, mean = trainer.collector.reward_deviation, trainer.collector.reward_mean
    roles = trainer.roles
    flat = trainer.collector.forward.batch(e.episodes, roles.device)
    with torch.no_grad(), roles.playing("reward") as model:
        rewards = roles.rewards(trainer.collector.forward.hidden(model, flat)[flat.rows])
    ends = torch.tensor([len(one.completion_ids) for one in e.episodes]).cumsum(0) - 1
    wanted = (rewards[ends] - mean) / deviation
    found = e.values[torch.arange(len(last)), last]
    assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("where", "number"),
    [("training_step", 7), pytest.param("draw", 2, marks=pytest.mark.slow)],
)
def test_a_run_goes_on_bit_by_bit(config, where, number):
    more = {"num_ppo_epochs": 2, "trainer": {"max_steps": 8, "save_steps": 3}}
    whole = trained(config(**more))
    part = config(**more, output_dir=whole.config.output_dir + "-part")
    first = make_trainer(part)
    owner = first.collector if where == "draw" else first
    original, calls = getattr(owner, where), []

    def failing(*given, **other):
        calls.append(1)
        if len(calls) == number:
            raise ZeroDivisionError
        return original(*given, **other)

    setattr(owner, where, failing)
    with pytest.raises(ZeroDivisionError):
        fit(first, first.folder)
    (kept,) = first.folder.checkpoints.glob("checkpoint-3")
    names = load_file(kept / WEIGHTS).keys()
    assert {n.split(".")[0] for n in names} == {"policy", "value", "value_head"}
    assert not any("base_layer" in n or "score" in n for n in names)
    second = trained(part)
    assert second.folder.attempt == 2
    assert same(weights(whole), weights(second))
    assert same(frozen(whole), frozen(second))


@pytest.mark.parametrize(
    "more",
    [
        {"value_init": "zero"},
        {"value_model": "policy"},
        {"lora": {"use_peft": False}},
    ],
    ids=["zero", "on the policy", "full"],
)
def test_where_the_value_is_no_adapter_over_it_the_reward_model_stands_alone(
    config, tokenizer, more
):
    settings = config(**more)
    roles = cast(settings)
    assert not roles.reward_on_value
    assert make_scorer(settings, roles, PROMPTS, tokenizer) is not None


def test_a_reward_model_that_reads_other_tokens_stands_alone(
    config, reward_model, tokenizer, tmp_path
):
    other = tmp_path / "other"
    shutil.copytree(reward_model, other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    settings = config(scorer={"reward_model": str(other), "reward_funcs": {}})
    roles = cast(settings)
    assert not roles.reward_on_value
    assert roles.reward_apart == "it is a full model"


def test_the_casting_is_said(config, capsys):
    settings = config()
    say_casting("ppo", cast(settings), settings)
    printed = " ".join("".join(capsys.readouterr()).split())
    assert "one base for policy, reference; another for reward and value" in printed


# --- full fine-tuning ------------------------------------------------------------------------


@pytest.mark.parametrize("its_tokens", ["the policy's", "others", "another template"])
def test_a_full_value_starts_from_a_reward_model_of_its_own_tokens_alone(
    config, reward_model, tmp_path, capsys, its_tokens
):
    """Weights of the right shape mean nothing where the ids stand for other tokens."""
    folder = shutil.copytree(reward_model, tmp_path / "reward")
    if its_tokens == "others":
        file = folder / "tokenizer.json"
        swapped = json.loads(file.read_text())
        vocabulary = swapped["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        file.write_text(json.dumps(swapped))
    if its_tokens == "another template":
        (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    settings = config(
        scorer={"reward_model": str(folder), "reward_funcs": {}}, lora={"use_peft": False}
    )
    roles = cast(settings)
    say_casting("ppo", roles, settings)
    said = " ".join(capsys.readouterr().err.split())
    layers = roles.value.config.num_hidden_layers
    if its_tokens == "the policy's":
        assert roles.reward_head is not None
        assert layers == 3
        assert "tokenizer" not in said
    else:
        assert roles.reward_head is None
        assert layers == roles.policy.config.num_hidden_layers == 2
        assert "another shape or tokenizer" in said
