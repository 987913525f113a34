"""The shipped recipes for real models: complete, lean, and with a header that says what one needs."""

import re

import pytest

from align.config.fields import config_class, leaf_fields
from align.config.load import is_pipeline, load_pipeline, load_stage, read_recipe
from align.resources import shipped, shipped_recipes

HERD = (
    *("llama3-8b", "llama3.1-8b", "llama3.1-70b", "llama3.1-405b"),
    *("llama3.2-1b", "llama3.2-3b"),
)
STAGES = (
    *("sft", "sft-qlora", "sft-full", "reward", "sample", "dpo", "ppo", "eval", "push"),
    "pipeline",
)
OTHERS = ("llama2-7b", "instruct", "tasks")
REAL = [recipe for recipe in shipped_recipes() if recipe.name.partition("/")[0] in HERD + OTHERS]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def every_stage(recipe):
    """The loaded stages of a recipe or pipeline."""
    document, _ = read_recipe(recipe.name)
    if is_pipeline(document):
        return load_pipeline(recipe.name, ready=False).stages
    return {recipe.kind: load_stage(recipe.name, ready=False)}


@pytest.mark.parametrize("model", HERD)
def test_every_model_has_every_stage(model):
    files = {path.stem for path in (shipped("recipes") / model).glob("*.yaml")}
    assert set(STAGES) <= files


@pytest.mark.parametrize("recipe", REAL, ids=lambda recipe: recipe.name)
def test_the_header_says_what_one_needs(recipe):
    lines = recipe.path.read_text(encoding="utf-8").splitlines()
    header = [line for line in lines if line.startswith("#")]
    assert lines[: len(header)] == header
    said = " ".join(header)
    assert re.search(r"\b(GPU|Memory)\b", said)
    for figure in re.finditer(r"about [\d.]+ (?:GB|TB)[^.;]*", said):
        assert "estimate" in said[figure.start() : figure.start() + 140], figure.group()
    document, _ = read_recipe(recipe.name)
    command = "run" if is_pipeline(document) else f"{document.data['stage']} --recipe"
    assert f"align {command} {recipe.name}" in said


@pytest.mark.parametrize(
    "recipe", [r for r in REAL if r.kind != "pipeline"], ids=lambda recipe: recipe.name
)
def test_only_what_differs_from_the_defaults_is_given(recipe):
    loaded = load_stage(recipe.name, ready=False)
    values = loaded.config.model_dump()
    same = []
    for leaf in leaf_fields(config_class(loaded.kind)):
        section, _, name = leaf.name.rpartition(".")
        value = (values[section] if section else values)[name]
        if loaded.origins[leaf.name] != "default" and value == leaf.default:
            same.append(leaf.name)
    assert same == []


@pytest.mark.parametrize("model", HERD)
def test_the_papers_settings(model):
    dpo = load_stage(f"{model}/dpo", ready=False).config
    assert (dpo.beta, dpo.rpo_alpha, dpo.mask_format_tokens) == (0.1, 0.2, True)
    sft = load_stage(f"{model}/sft", ready=False).config
    reward = load_stage(f"{model}/reward", ready=False).config
    assert reward.model.model_name_or_path == sft.model.model_name_or_path, "the pretrained model"
    assert not reward.use_margin
    sample = load_stage(f"{model}/sample", ready=False).config
    assert 10 <= sample.generation.num_generations <= 30
    full = load_stage(f"{model}/sft-full", ready=False).config
    assert not full.lora.use_peft
    assert full.trainer.learning_rate == 1e-5
    assert load_stage(f"{model}/sft-qlora", ready=False).config.model.load_in_4bit


@pytest.mark.parametrize("model", HERD)
def test_a_push_is_ready_and_runs_only_when_asked_for(model):
    alone = load_stage(f"{model}/push", ["repo_id=me/Llama-3-x", "public=true"], ready=False)
    assert alone.config.run == f"runs/{model}/dpo"
    assert "push" not in load_pipeline(f"{model}/pipeline", ready=False).chosen
    chosen = load_pipeline(f"{model}/pipeline", with_stages=["push"], ready=False)
    assert chosen.chosen[-1] == "push"
    assert chosen.stages["push"].config.run == "$dpo"


def test_llama_2_has_its_papers_settings():
    """arXiv 2307.09288, section 3: margins; PPO's batch 512 in minibatches of 64, and its optimizer."""
    assert load_stage("llama2-7b/reward", ready=False).config.use_margin
    ppo = load_stage("llama2-7b/ppo", ready=False).config
    trainer = ppo.trainer
    minibatch = trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps
    assert (minibatch, minibatch * ppo.num_mini_batches, ppo.num_ppo_epochs) == (64, 512, 1)
    assert 200 <= ppo.total_episodes / 512 <= 400
    assert (ppo.kl_coef, ppo.cliprange, ppo.whiten_rewards) == (0.01, 0.2, True)
    assert (trainer.learning_rate, trainer.lr_scheduler_type) == (1e-6, "constant")
    assert (trainer.adam_beta1, trainer.adam_beta2, trainer.adam_epsilon) == (0.9, 0.95, 1e-5)
    assert (trainer.weight_decay, trainer.max_grad_norm, trainer.warmup_steps) == (0.1, 1.0, 0)
    sft = load_stage("llama2-7b/sft", ready=False).config.trainer
    assert (sft.learning_rate, sft.num_train_epochs, sft.weight_decay) == (2e-5, 2, 0.1)
    assert sft.per_device_train_batch_size * sft.gradient_accumulation_steps == 64


def data_of(stage):
    data = stage.config.data
    return [data.dataset_name] if data.dataset_name else [one.path for one in data.datasets]


def test_llama_2_rounds():
    """Rejection sampling from the base on the best of all rounds, then PPO on the last one's model."""
    stages = load_pipeline("llama2-7b/pipeline", ready=False).stages
    assert [name for name in stages if "@" not in name] == ["sft", "reward", "ppo", "eval"]
    drawn = [stages[f"best@{n}"].config.model.model_name_or_path for n in (1, 2, 3, 4)]
    assert drawn == ["$sft", "$rs@1", "$rs@2", "$rs@3"]
    base = stages["sft"].config.model.model_name_or_path
    for number in (1, 2, 3, 4):
        trained = stages[f"rs@{number}"]
        assert trained.config.model.model_name_or_path == base
        assert data_of(trained) == [f"$best@{n}/sft.jsonl" for n in range(1, number + 1)]
    assert stages["ppo"].config.model.model_name_or_path == "$rs@4"
    splits = {stages[f"best@{n}"].config.data.dataset_train_split for n in (1, 2, 3, 4)}
    assert len(splits) == 4


def test_llama_3_rounds():
    """Six rounds: the reward model and SFT from the pretrained model, DPO on this round's SFT and preferences."""
    pipeline = load_pipeline("llama3.1-8b/rounds", ready=False)
    stages = pipeline.stages
    assert pipeline.pending == ()
    base = stages["seed"].config.model.model_name_or_path
    for number in range(1, 7):
        reward, sft, dpo = (stages[f"{name}@{number}"] for name in ("reward", "sft", "dpo"))
        assert reward.config.model.model_name_or_path == sft.config.model.model_name_or_path == base
        pairs = [f"$preferences@{n}/pairs.jsonl" for n in range(1, number + 1)]
        assert data_of(reward)[1:] == pairs, "all preferences so far"
        assert data_of(dpo) == pairs[-1:], "the most recent ones"
        assert data_of(sft)[1:] == [f"$best@{number}/sft.jsonl"]
        assert dpo.config.model.model_name_or_path == f"$mean@{number}"
        assert (dpo.config.beta, dpo.config.rpo_alpha, dpo.config.mask_format_tokens) == (
            0.1,
            0.2,
            True,
        )
        latest = "$seed" if number == 1 else f"$dpo@{number - 1}"
        for name in ("preferences", "best"):
            assert stages[f"{name}@{number}"].config.model.model_name_or_path == latest


@pytest.mark.parametrize("model", HERD)
def test_a_pipeline_hands_over(model):
    """What one stage leaves is what the next one reads, whatever its own file says."""
    pipeline = load_pipeline(f"{model}/pipeline", with_stages=(), ready=False)
    values = {name: str(stage.config.model_dump()) for name, stage in pipeline.stages.items()}
    for stage, taken in (("best", "$sft"), ("best", "$reward"), ("dpo", "$best/pairs.jsonl")):
        assert taken in values[stage]
    assert "$dpo" in values["eval"]
    assert pipeline.pending == ()
