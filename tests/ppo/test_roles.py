"""One base, four roles: switching restores, the reference stays, the reward is the reward model's."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from ppo_runs import merged, ppo_config
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from align.errors import AlignError
from align.generation.answers import Prompt
from align.generation.scoring import RewardScorer, token_logprobs
from align.models.adapters import save_adapter
from align.models.identity import write_base_identity
from align.models.loading import load_policy, load_reward_base, load_reward_model
from align.models.tokenizer import load_tokenizer
from align.ppo.casting import cast_roles, check_room, make_scorer, say_casting
from align.ppo.experience import Episode
from align.ppo.forward import Forward
from align.ppo.roles import Roles
from align.stages.ppo import PPOConfig

PROMPTS = [[0, 40, 50, 60], [0, 70, 80, 90, 100, 110]]
COMPLETIONS = [[120, 130, 4], [140, 4]]
SEQUENCES = [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
EPISODES = [
    Episode(n, p, c, True, "") for n, (p, c) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True))
]


def shake(
    model, *, seed: int, names=("lora_B", "magnitude", "trainable_tokens", "modules_to_save")
):
    """Move an adapter away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in names) and parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def logprobs(model, temperature: float = 1.0) -> torch.Tensor:
    found = token_logprobs(model, PROMPTS, COMPLETIONS, temperature=temperature)
    return torch.tensor([value for row in found for value in row])


def of_role(roles: Roles, role: str) -> torch.Tensor:
    forward = Forward(roles.policy, 1.0)
    with torch.no_grad(), roles.playing(role) as model:
        forward.settle(model, EPISODES)
        return forward.completions(model, forward.batch(EPISODES, roles.device))[0]


@pytest.fixture(scope="session")
def reward_adapter(llama, tokenizer, tmp_path_factory):
    """What `align reward` leaves: a moved adapter with its head, the base's identity, a tokenizer."""

    def make(seed: int = 1, base=llama, **more):
        torch.manual_seed(seed)
        section = section_of(base)
        from align.models.identity import look_at

        classifier = load_reward_base(section, look_at(str(base)), train_base=False)
        settings = {"r": 3, "lora_alpha": 9, "target_modules": "all-linear"} | more
        config = LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], **settings)
        model = get_peft_model(classifier, config)
        shake(model, seed=seed)
        folder = tmp_path_factory.mktemp("reward")
        save_adapter(model, folder, base=str(base), revision="main")
        write_base_identity(folder, str(base), classifier.config.to_dict())
        tokenizer.save_pretrained(folder)
        return folder

    return make


def section_of(llama, **more):
    from align.config.sections import ModelSection

    return ModelSection(model_name_or_path=str(llama), **more)


@pytest.fixture(scope="session")
def sft_adapter(llama, tokenizer, tmp_path_factory):
    def make(**settings):
        torch.manual_seed(2)
        settings = {"r": 2, "target_modules": "all-linear"} | settings
        model = get_peft_model(
            load_policy(section_of(llama)), LoraConfig(task_type="CAUSAL_LM", **settings)
        )
        shake(model, seed=2)
        folder = tmp_path_factory.mktemp("sft")
        save_adapter(model, folder, base=str(llama), revision="main")
        write_base_identity(folder, str(llama), model.config.to_dict())
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def cast(llama, tmp_path):
    def cast(**more) -> tuple[PPOConfig, Roles]:
        config = ppo_config(llama, tmp_path, **more)
        torch.manual_seed(0)
        return config, cast_roles(config, load_tokenizer(config.model), [])

    return cast


def scorer_of(path, **more):
    return {"scorer": {"reward_model": str(path), "reward_funcs": {}, **more}}


def layer_states(roles: Roles):
    return [
        (tuple(layer.active_adapters), layer.disable_adapters)
        for layer in roles.modules()
        if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]


# --- switching -------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["policy", "reference", "value", "reward"])
def test_playing_restores_what_was_active_and_trainable(cast, reward_adapter, role):
    _, roles = cast(**scorer_of(reward_adapter()))
    before = layer_states(roles), [(n, p.requires_grad) for n, p in roles.named_parameters()]

    def now():
        return layer_states(roles), [(n, p.requires_grad) for n, p in roles.named_parameters()]

    with roles.playing(role):
        assert now()[1] == before[1]
        with roles.playing("value"), roles.playing("reference"):
            pass
        inside = now()
        assert (inside[0] == before[0]) == (role == "policy")
    assert now() == before
    with pytest.raises(ZeroDivisionError), roles.playing(role):
        raise ZeroDivisionError
    assert now() == before


def test_every_role_has_weights_of_its_own(cast, reward_adapter):
    _, roles = cast(**scorer_of(reward_adapter()))
    shake(roles.policy, seed=3)
    found = {role: of_role(roles, role) for role in ("policy", "reference", "value", "reward")}
    for one in found:
        for other in found:
            assert (one == other) == bool((found[one] - found[other]).abs().max() < 1e-3)


def test_what_is_trained(cast, reward_adapter):
    _, roles = cast(**scorer_of(reward_adapter()))
    policy = {id(p) for p in roles.policy_parameters()}
    value = {id(p) for p in roles.value_parameters()}
    assert not policy & value
    assert policy | value == {id(p) for p in roles.parameters() if p.requires_grad}
    names = {n for n, p in roles.named_parameters() if id(p) in policy}
    assert all(".default." in name for name in names)
    assert roles.trained_state().keys() == {
        n for n, p in roles.named_parameters() if p.requires_grad
    }


def test_a_checkpoint_of_other_weights_is_refused(cast):
    _, roles = cast()
    state = roles.trained_state()
    state.pop(next(iter(state)))
    with pytest.raises(AlignError, match="other weights"):
        roles.load_trained_state(state)


# --- reference -------------------------------------------------------------------------------


def test_the_reference_of_a_new_adapter_is_the_base(cast, llama):
    _, roles = cast()
    base = logprobs(load_policy(section_of(llama)))
    assert_close(of_role(roles, "policy"), base, rtol=1e-4, atol=1e-4)
    shake(roles.policy, seed=3)
    assert_close(of_role(roles, "reference"), base, rtol=1e-4, atol=1e-4)
    assert (of_role(roles, "policy") - base).abs().max() > 1e-2


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"trainable_token_indices": [4, 40, 120]},
        {"modules_to_save": ["embed_tokens"]},
    ],
    ids=["lora", "dora", "tokens", "saved"],
)
def test_the_reference_of_a_continued_adapter_is_that_adapter(cast, llama, sft_adapter, settings):
    folder = sft_adapter(**settings)
    model = {"adapter_name_or_path": str(folder), "adapter_mode": "continue"}
    _, roles = cast(model=model)
    wanted = logprobs(load_policy(section_of(llama, **model)))
    assert (wanted - logprobs(load_policy(section_of(llama)))).abs().max() > 1e-2
    assert_close(of_role(roles, "policy"), wanted, rtol=1e-4, atol=1e-4)
    shake(roles.policy, seed=3)
    assert_close(of_role(roles, "reference"), wanted, rtol=1e-4, atol=1e-4)
    assert (of_role(roles, "policy") - wanted).abs().max() > 1e-2


def test_the_reference_of_a_full_policy_is_a_frozen_copy(cast, llama):
    _, roles = cast(lora={"use_peft": False})
    base = logprobs(load_policy(section_of(llama)))
    with torch.no_grad():
        for parameter in roles.policy.parameters():
            parameter.add_(0.05)
    assert_close(of_role(roles, "reference"), base, rtol=1e-4, atol=1e-4)
    assert (of_role(roles, "policy") - base).abs().max() > 1e-2
    assert not any(p.requires_grad for p in roles.reference.parameters())


# --- reward ----------------------------------------------------------------------------------


def shared_rewards(roles: Roles) -> torch.Tensor:
    forward = Forward(roles.policy, 1.0)
    flat = forward.batch(EPISODES, roles.device)
    with torch.no_grad(), roles.playing("reward") as model:
        return roles.rewards(forward.hidden(model, flat)[flat.last])


def own_rewards(folder, tokenizer) -> torch.Tensor:
    model, _ = load_reward_model(str(folder))
    return torch.tensor(RewardScorer(model, tokenizer).score(SEQUENCES))


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"target_modules": ["q_proj", "up_proj"]}],
    ids=["lora", "rslora", "dora", "some"],
)
def test_a_reward_adapter_on_the_shared_base_gives_its_own_rewards(
    cast, reward_adapter, tokenizer, settings
):
    folder = reward_adapter(**settings)
    config, roles = cast(**scorer_of(folder))
    assert roles.reward_apart is None
    assert roles.shares_reward
    wanted = own_rewards(folder, tokenizer)
    assert_close(shared_rewards(roles), wanted, rtol=1e-4, atol=1e-4)
    shake(roles.policy, seed=4)
    assert_close(shared_rewards(roles), wanted, rtol=1e-4, atol=1e-4)
    assert make_scorer(config, roles, [], tokenizer) is None


def test_the_reward_adapter_fits_beside_a_continued_one(
    cast, reward_adapter, sft_adapter, tokenizer
):
    folder = reward_adapter()
    tokens = sft_adapter(trainable_token_indices=[4, 40, 120])
    model = {"adapter_name_or_path": str(tokens), "adapter_mode": "continue"}
    _, roles = cast(model=model, **scorer_of(folder))
    assert roles.shares_reward
    assert_close(shared_rewards(roles), own_rewards(folder, tokenizer), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", ["control", [4, 40, 120]])
@pytest.mark.parametrize("shared", [True, False])
def test_trained_token_rows_are_the_policy_s_alone(cast, reward_adapter, tokenizer, tokens, shared):
    folder = reward_adapter()
    lora = {"trainable_token_indices": tokens}
    _, roles = cast(lora=lora, **scorer_of(folder, share_base=shared))
    shake(roles.policy, seed=5)
    value = Roles.values(roles, torch.zeros(1, 32))
    assert value.shape == (1,)
    assert of_role(roles, "value").isfinite().all()
    if shared:
        assert_close(shared_rewards(roles), own_rewards(folder, tokenizer), rtol=1e-4, atol=1e-4)


def test_the_value_begins_as_the_normalized_reward(cast, reward_adapter):
    _, roles = cast(**scorer_of(reward_adapter()))
    roles.start_value_from_reward(mean=0.3, deviation=2.0)
    forward = Forward(roles.policy, 1.0)
    flat = forward.batch(EPISODES, roles.device)
    with torch.no_grad(), roles.playing("value") as model:
        values = roles.values(forward.hidden(model, flat)[flat.last])
    assert_close(values, (shared_rewards(roles) - 0.3) / 2.0, rtol=1e-4, atol=1e-4)


def edited(folder, tmp_path, **changes):
    copy = tmp_path / "edited"
    shutil.copytree(folder, copy)
    file = copy / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return copy


def apart(cast, path, **more):
    config, roles = cast(**merged(scorer_of(path), more))
    assert not roles.shares_reward
    assert roles.reward_head is None
    return config, roles


def test_why_a_reward_model_keeps_weights_of_its_own(
    cast, llama, make_llama, reward_adapter, sft_adapter, tokenizer, tmp_path
):
    folder = reward_adapter()
    assert cast()[1].reward_apart == "there is none"
    found = apart(cast, folder, scorer={"share_base": False})[1]
    assert found.reward_apart == "scorer.share_base is off"

    full = tmp_path / "full"
    load_reward_model(str(folder))[0].merge_and_unload().save_pretrained(full)
    tokenizer.save_pretrained(full)
    assert apart(cast, full, value_init="zero")[1].reward_apart == "it is a full model"

    stacked = {"model": {"adapter_name_or_path": str(sft_adapter()), "adapter_mode": "stack"}}
    assert "folded into it" in apart(cast, folder, **stacked)[1].reward_apart

    other = make_llama(seed=9, tie=False)
    assert apart(cast, reward_adapter(base=other))[1].reward_apart == f"its base is {other}"

    words = tmp_path / "words"
    shutil.copytree(folder, words)
    template = words / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert "tokenizer or chat template" in apart(cast, words)[1].reward_apart


def test_a_reward_adapter_that_trains_more_keeps_weights_of_its_own(
    cast, reward_adapter, tokenizer, tmp_path
):
    folder = reward_adapter(trainable_token_indices=[4, 40])
    config, roles = apart(cast, folder)
    assert "more than low-rank adapters and a head" in roles.reward_apart
    prompts = [Prompt(n, ids, {"prompt": "x"}) for n, ids in enumerate(PROMPTS)]
    scorer = make_scorer(config, roles, prompts, tokenizer)
    assert len(scorer(EPISODES)) == 2
    plain = reward_adapter()
    saved = edited(plain, tmp_path, modules_to_save=["score", "embed_tokens"])
    assert "more than low-rank" in apart(cast, saved)[1].reward_apart


def test_a_reward_adapter_with_a_strange_weight_leaves_nothing_behind(
    cast, reward_adapter, tmp_path
):
    folder = edited(reward_adapter(), tmp_path)
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    name = next(name for name in state if "layers.1" in name and "lora_A" in name)
    state[name.replace("layers.1", "layers.7")] = state.pop(name)
    save_file(state, file)
    _, roles = apart(cast, folder)
    assert "do not fit" in roles.reward_apart
    assert roles.adapters == {"default", "value"}
    assert not any(".reward." in name for name, _ in roles.named_parameters())
    before = layer_states(roles)
    with roles.playing("value"), roles.merged():
        pass
    assert layer_states(roles) == before


def test_the_casting_is_said(cast, reward_adapter, capsys):
    config, roles = cast(**scorer_of(reward_adapter()))
    say_casting("ppo", roles, config)
    printed = "".join(capsys.readouterr())
    assert "one base for policy, reference, value, reward" in " ".join(printed.split())


# --- drawing from folded weights -------------------------------------------------------------


def base_weights(roles: Roles):
    return {n: p.detach().clone() for n, p in roles.policy.named_parameters() if "lora_" not in n}


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_folded_weights_are_the_policy_and_the_same_ones_come_back(cast, settings):
    _, roles = cast(lora=settings)
    shake(roles.policy, seed=6)
    assert roles.can_merge()
    before, states, wanted = base_weights(roles), layer_states(roles), logprobs(roles.policy)
    storage = [p.data_ptr() for p in roles.policy.parameters()]
    with torch.no_grad(), roles.playing("policy"), roles.merged():
        assert_close(logprobs(roles.policy), wanted, rtol=1e-4, atol=1e-4)
        assert any(disabled for _, disabled in layer_states(roles))
    assert [p.data_ptr() for p in roles.policy.parameters()] == storage
    assert all(torch.equal(before[n], w) for n, w in base_weights(roles).items())
    assert layer_states(roles) == states
    with pytest.raises(ZeroDivisionError), torch.no_grad(), roles.merged():
        raise ZeroDivisionError
    assert all(torch.equal(before[n], w) for n, w in base_weights(roles).items())
    assert layer_states(roles) == states


def test_layers_without_the_policy_s_adapter_are_left_as_they_are(cast, reward_adapter):
    """The policy adapts two kinds of layers, the reward model all of them."""
    lora = {"lora_target_modules": ["q_proj", "v_proj"]}
    _, roles = cast(lora=lora, **scorer_of(reward_adapter()))
    shake(roles.policy, seed=6)
    wanted = logprobs(roles.policy)
    with torch.no_grad(), roles.playing("policy"), roles.merged():
        assert_close(logprobs(roles.policy), wanted, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_folded_is_not(cast):
    assert not cast(lora={"use_dora": True})[1].can_merge()
    assert not cast(lora={"use_peft": False})[1].can_merge()
    assert not cast(model={"dtype": "bfloat16"})[1].can_merge()


def test_folding_that_is_asked_for_and_impossible_is_refused_before_anything_is_drawn(
    cast, sft_adapter
):
    """What the recipe does not show: the adapter that is gone on with is DoRA, or sits on a tied head."""
    folded = {"generation": {"fold_adapter": True}}
    model = {"adapter_name_or_path": str(sft_adapter(use_dora=True)), "adapter_mode": "continue"}
    assert cast(model=model)[1].unmergeable is not None
    with pytest.raises(AlignError, match=r"fold_adapter: true.*DoRA") as error:
        cast(model=model, **folded)
    assert "leave fold_adapter out" in str(error.value)
    tied = {"lora_target_modules": ["q_proj", "lm_head"]}
    assert not cast(lora=tied)[1].can_merge()
    with pytest.raises(AlignError, match="output head that is the input embedding"):
        cast(lora=tied, **folded)
    assert cast(model={"dtype": "bfloat16"}, **folded)[1].unmergeable is None
    assert cast(lora={"use_peft": False}, **folded)[1].unmergeable is None


def test_quantized_weights_cannot_be_folded_into(cast):
    _, roles = cast()
    layer = next(layer for layer in roles.policy.modules() if isinstance(layer, LoraLayer))
    layer.get_base_layer().weight = torch.nn.Parameter(
        torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False
    )
    assert roles.unmergeable == "the weights under it are quantized"
    assert not roles.can_merge()


# --- prompts ---------------------------------------------------------------------------------


def test_prompts_beyond_the_context_are_refused_with_their_row(llama):
    policy = load_policy(section_of(llama))
    short = Prompt(0, [1] * 500, {"prompt": "x"})
    check_room(policy, [short], 12)
    with pytest.raises(AlignError, match=r"1 of 2 prompts.*context of 512") as error:
        check_room(policy, [short, Prompt(6, [1] * 505, {"prompt": "x"})], 12)
    assert "row 7" in str(error.value)
    assert "500" in str(error.value)
    with pytest.raises(AlignError) as error:
        check_room(policy, [Prompt(6, [1] * 38, {"prompt": "x"})], 512)
    assert error.value.problems[0].hint == "lower generation.max_new_tokens to 474"


def test_dropout_is_off_for_good(llama):
    settings = LoraConfig(r=2, lora_dropout=0.5, task_type="CAUSAL_LM")
    from align.ppo.roles import silence_dropout

    model = get_peft_model(load_policy(section_of(llama)), settings)
    roles = Roles(model)
    shake(model, seed=1)
    silence_dropout(roles)
    roles.train()
    ids = torch.tensor([SEQUENCES[0]])
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert isinstance(model, PeftModel)
