"""`align ppo` from recipe to artifact: what it starts from, what it leaves, and how it goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from ppo_runs import artifact_weights, figures, lines, ppo_config
from torch.testing import assert_close

from align.config.load import load_stage
from align.config.sections import ModelSection
from align.errors import AlignError
from align.generation.scoring import token_logprobs
from align.models.loading import load_any_policy, load_policy
from align.ppo.trainer import PPOTrainer
from align.runs import run_stage
from align.stages.ppo import PPOConfig
from align.stages.reward import RewardConfig
from align.stages.sft import SFTConfig

PROMPTS, COMPLETIONS = [[0, 2, 40, 50], [0, 60]], [[70, 80, 4], [90, 100, 110]]


def logprobs(model) -> torch.Tensor:
    found = token_logprobs(model, PROMPTS, COMPLETIONS)
    return torch.tensor([value for row in found for value in row])


@pytest.fixture
def ran(monkeypatch):
    """Run the stage; the artifact, and the log-probabilities of the policy that was trained."""

    def ran(config: PPOConfig) -> tuple[Path, torch.Tensor]:
        seen = []
        close = PPOTrainer.close

        def closing(trainer):
            close(trainer)
            with torch.no_grad(), trainer.roles.playing("policy") as model:
                seen.append(logprobs(model))

        with monkeypatch.context() as patch:
            patch.setattr(PPOTrainer, "close", closing)
            return run_stage(config, quiet=True) / "artifact", seen[0]

    return ran


def train(kind, llama, output, rows, **more) -> Path:
    data = output.with_suffix(".jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = {
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "gradient_checkpointing": False,
        "learning_rate": 1e-2,
    }
    config = {
        "output_dir": str(output),
        "model": {"model_name_or_path": str(llama)},
        "lora": {"lora_r": 4, "lora_alpha": 8},
        "data": {"dataset_name": str(data), "max_length": 256},
        "trainer": trainer,
    }
    return run_stage(kind.model_validate(config | more), quiet=True) / "artifact"


@pytest.fixture(scope="module")
def reward_model(llama, tmp_path_factory):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"say {n}"}],
            "chosen": [{"role": "assistant", "content": "a" * n}],
            "rejected": [{"role": "assistant", "content": "no" * n}],
        }
        for n in range(1, 9)
    ]
    return train(RewardConfig, llama, tmp_path_factory.mktemp("rm") / "reward", rows)


@pytest.fixture(scope="module")
def sft(llama, tmp_path_factory):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say {n}"},
                {"role": "assistant", "content": "a" * n},
            ]
        }
        for n in range(1, 9)
    ]

    def make(name="plain", **lora):
        folder = tmp_path_factory.mktemp("sft") / name
        return train(SFTConfig, llama, folder, rows, lora={"lora_r": 4, **lora})

    return make


STARTS = {
    "new adapter": {},
    "merged": {"merge_adapter": True},
    "full": {"lora": {"use_peft": False}, "trainer": {"learning_rate": 1e-3}},
    "dora": {"lora": {"use_dora": True}},
    "control tokens": {"lora": {"trainable_token_indices": "control"}},
    "control tokens, merged": {
        "lora": {"trainable_token_indices": "control"},
        "merge_adapter": True,
    },
    "value on the policy": {"value_model": "policy"},
    "continue": {"model": {"adapter_mode": "continue"}},
    "stack": {"model": {"adapter_mode": "stack"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_the_artifact_is_the_trained_policy(llama, tmp_path, ran, sft, reward_model, start):
    more = dict(STARTS[start])
    before = load_policy(ModelSection(model_name_or_path=str(llama)))
    if "model" in more:
        adapter = sft()
        more["model"] = {**more["model"], "adapter_name_or_path": str(adapter)}
        before, _ = load_any_policy(str(adapter))
    scorer = {"reward_model": str(reward_model), "reward_funcs": {}}
    config = ppo_config(llama, tmp_path, **more, scorer=scorer)
    artifact, trained = ran(config)
    model, tokenizer = load_any_policy(str(artifact))
    assert_close(logprobs(model), trained, rtol=1e-3, atol=1e-3)
    assert (trained - logprobs(before)).abs().max() > 1e-2
    assert figures(artifact.parent, "objective/kl")[0] == 0.0
    names = " ".join(artifact_weights(artifact))
    assert not any(word in names for word in ("value", "reward", "ref", "score"))
    assert tokenizer.chat_template
    generation = json.loads((artifact / "generation_config.json").read_text())
    assert len(generation["eos_token_id"]) == 2
    assert (artifact.parent / "samples.jsonl").is_file()
    assert not (artifact.parent / "checkpoints").exists()
    assert not list(artifact.parent.rglob("training_args.bin"))


def test_a_reward_model_that_align_trained_shares_the_base(llama, tmp_path, ran, reward_model):
    """The same run with the reward model on weights of its own: the same scores, the same policy."""
    shared = {"reward_model": str(reward_model), "reward_funcs": {}}
    apart = shared | {"share_base": False, "score_batch_size": 3}
    more = {"value_init": "zero", "lora": {"lora_r": 4, "lora_alpha": 8}}
    one, _ = ran(ppo_config(llama, tmp_path, scorer=shared, **more))
    other, _ = ran(
        ppo_config(llama, tmp_path, output_dir=str(tmp_path / "apart"), scorer=apart, **more)
    )
    first, second = (figures(run.parent, "objective/scores") for run in (one, other))
    assert first[0] == pytest.approx(second[0], abs=1e-4)
    rows = [lines(run.parent, "samples.jsonl")[:8] for run in (one, other)]
    for mine, its in zip(*rows, strict=True):
        assert mine["completion"] == its["completion"]
        assert mine["score"] == pytest.approx(its["score"], abs=1e-4)


def test_reward_models_and_functions_are_added_up(llama, tmp_path, ran, reward_model):
    def scores(name, scorer):
        config = ppo_config(
            llama,
            tmp_path,
            output_dir=str(tmp_path / name),
            scorer={"reward_model": None, "reward_funcs": {}, **scorer},
            trainer={"max_steps": 1},
        )
        artifact, _ = ran(config)
        return [row["score"] for row in lines(artifact.parent, "samples.jsonl")]

    model = scores("model", {"reward_model": str(reward_model)})
    codes = scores("codes", {"reward_funcs": {"test_codes": 1.0}})
    both = scores(
        "both",
        {
            "reward_model": str(reward_model),
            "reward_model_weight": 2.0,
            "reward_funcs": {"test_codes": -3.0},
        },
    )
    wanted = [2 * one - 3 * other for one, other in zip(model, codes, strict=True)]
    assert both == pytest.approx(wanted, abs=1e-4)


def test_a_reward_function_that_fails_leaves_a_run_that_goes_on(llama, tmp_path, monkeypatch):
    from align.registry import REWARD_FUNCS

    honest, calls = REWARD_FUNCS["test_codes"], []

    def failing(completions, **columns):
        calls.append(len(completions))
        if len(calls) == 2:
            raise OSError("no connection")
        return honest(completions=completions, **columns)

    config = ppo_config(llama, tmp_path, trainer={"save_steps": 1})
    monkeypatch.setitem(REWARD_FUNCS, "test_codes", failing)
    with pytest.raises(AlignError, match="raised OSError: no connection"):
        run_stage(config, quiet=True)
    done = run_stage(config, quiet=True)
    summary = json.loads((done / "summary.json").read_text())
    assert (summary["attempts"], summary["steps"]) == (2, 4)


def test_prompts_beyond_the_context_are_refused_before_anything_is_drawn(llama, tmp_path):
    with pytest.raises(AlignError, match="longer than the model's context of 512") as error:
        run_stage(ppo_config(llama, tmp_path, generation={"max_new_tokens": 500}), quiet=True)
    assert "row" in str(error.value)
    assert not (tmp_path / "ppo.partial").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("generation.top_p=0.9", "log-probabilities know nothing of"),
        ("generation.top_k=5", "log-probabilities know nothing of"),
        ("lora.lora_dropout=0.1", "makes a ratio of probabilities noise"),
        ("scorer.reward_funcs={none.py:f: 1.0}", "names no file"),
        ("generation.num_generations=3", "does not divide the 8 episodes"),
        ("trainer.eval_strategy=steps", "evaluates nothing in PPO"),
        ("scorer.reward_funcs={}", "is required"),
        ("scorer.reward_funcs={containz: 1.0}", "did you mean `contains`"),
    ],
)
def test_settings_that_make_no_sense_are_refused_with_the_recipe(llama, tmp_path, setting, message):
    config = ppo_config(llama, tmp_path, scorer={"reward_funcs": {}})
    recipe = config.model_dump(mode="json", exclude_unset=True)
    recipe["scorer"] = {"reward_funcs": {"contains": 1.0}}
    key, _, value = setting.partition("=")
    section, _, name = key.partition(".")
    recipe.setdefault(section, {})[name] = yaml.safe_load(value)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"stage": "ppo", **recipe}))
    with pytest.raises(AlignError) as error:
        load_stage(path)
    assert message in " ".join(str(error.value).split())


def test_a_recipe_cannot_allow_code(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("stage: ppo\nallow_code: true\nscorer: {allow_code: true}\n")
    with pytest.raises(AlignError) as error:
        load_stage(path)
    assert "`allow_code` is no key of `ppo`" in str(error.value)
    assert "`scorer.allow_code` is no key" in str(error.value)


@pytest.mark.parametrize(
    ("more", "other"),
    [
        ({"lora": {"use_dora": True}}, "lora.use_dora"),
        ({"model": {"load_in_4bit": True}}, "model.load_in_4bit"),
        ({"model": {"load_in_8bit": True}}, "model.load_in_8bit"),
    ],
)
def test_an_adapter_that_is_no_sum_is_not_folded(llama, tmp_path, more, other):
    config = ppo_config(llama, tmp_path, **more, generation={"fold_adapter": True})
    recipe = config.model_dump(mode="json", exclude_unset=True)
    recipe["scorer"] = {"reward_funcs": {"contains": 1.0}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"stage": "ppo", **recipe}))
    with pytest.raises(AlignError) as error:
        load_stage(path)
    (problem,) = error.value.problems
    assert "`generation.fold_adapter`" in problem.message
    assert f"`{other}`" in problem.message
    del recipe["generation"]["fold_adapter"]
    path.write_text(yaml.safe_dump({"stage": "ppo", **recipe}))
    assert load_stage(path).config.generation.fold_adapter is None


KILLS = ["drawing 1", "drawing 3", "looking 3", "update 7", "update 14", "saving 2", "saved 3"]


@pytest.mark.slow
def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(llama, tmp_path):
    probe = Path(__file__).with_name("ppo_probe.py")
    done = subprocess.run(
        [sys.executable, str(probe), str(tmp_path), str(llama), "undisturbed", *KILLS],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    whole, *killed = (json.loads(line) for line in done.stdout.splitlines() if line[:1] == "{")
    assert whole["codes"] == [0]
    assert [one["scenario"] for one in killed] == KILLS
    for one in killed:
        assert one["codes"] == [-9, 0], one
        assert one["attempts"] == 2
        for key in ("policy", "value", "samples"):
            assert one[key] == whole[key], one
