"""What must hold between values, and the names of other libraries."""

import inspect
import re
from pathlib import Path

import pytest

from align.config import names
from align.config.load import load_stage
from align.errors import AlignError

COMMON = "output_dir: o\ndata: {dataset_name: org/rows}\n"
MODEL = "model: {model_name_or_path: org/base}\n"
STAGES = {
    "sft": f"stage: sft\n{COMMON}{MODEL}",
    "reward": f"stage: reward\n{COMMON}{MODEL}",
    "dpo": f"stage: dpo\n{COMMON}{MODEL}",
    "sample": f"stage: sample\n{COMMON}{MODEL}scorer: {{judge: exact}}\n",
    "eval": f"stage: eval\n{COMMON}models: {{a: org/a, b: org/b}}\njudge: exact\n",
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(kind: str, *overrides: str):
    Path("r.yaml").write_text(STAGES[kind])
    return load_stage("r.yaml", overrides).config


@pytest.mark.parametrize("kind", STAGES)
def test_the_plain_recipes_are_right(kind):
    assert load(kind).stage == kind


@pytest.mark.parametrize(
    ("kind", "overrides", "key", "words"),
    [
        ("sft", "dataset_name=null", "data.dataset_name", "is required (or `data.datasets`)"),
        ("sft", "datasets=[{path: org/a}]", "data.datasets", "are both given"),
        ("sft", "dataset_name=null datasets=[]", "data.datasets", "is an empty list"),
        (
            "sft",
            "dataset_name=null datasets=[{path: org/a, weight: 1}, {path: org/b}]",
            "data.datasets",
            "others have one",
        ),
        (
            "sft",
            "test_split_size=0.1 dataset_test_split=test",
            "data.test_split_size",
            "are both given",
        ),
        ("sft", "eval_strategy=steps", "trainer.eval_strategy", "no rows are held out"),
        ("sft", "load_in_4bit=true load_in_8bit=true", "model.load_in_8bit", "both on"),
        ("sft", "load_in_4bit=true use_peft=false", "model.load_in_4bit", "all trained"),
        ("sft", "load_in_8bit=true merge_adapter=true", "merge_adapter", "round the adapter"),
        ("sft", "use_peft=false merge_adapter=true", "merge_adapter", "merges an adapter"),
        ("sft", "adapter_mode=continue", "model.adapter_mode", "there is none"),
        (
            "sft",
            "adapter_name_or_path=org/a adapter_mode=continue use_peft=false",
            "model.adapter_mode",
            "`lora.use_peft` is off",
        ),
        (
            "dpo",
            "adapter_name_or_path=org/a load_in_4bit=true",
            "model.adapter_mode",
            "quantized weights",
        ),
        ("sft", "optim=adamw_trch", "trainer.optim", "did you mean `adamw_torch`?"),
        ("sft", "lr_scheduler_type=cosin", "trainer.lr_scheduler_type", "did you mean `cosine`?"),
        ("sft", "report_to=[wandb, wnadb]", "trainer.report_to", "did you mean `wandb`?"),
        ("sft", "max_steps=0", "trainer.max_steps", "is no number of steps: 0"),
        ("dpo", "max_steps=-2", "trainer.max_steps", "is no number of steps: -2"),
        ("sft", "warmup_steps=1.5", "trainer.warmup_steps", "is no number of steps"),
        ("dpo", "loss_type=sigmod", "loss_type", "did you mean `sigmoid`?"),
        ("dpo", "loss_type=[]", "loss_type", "is an empty list"),
        ("dpo", "loss_type=[sigmoid, sft] loss_weights=[1]", "loss_weights", "1 weights for 2"),
        ("dpo", "loss_type=[sigmoid, sft] rpo_alpha=0.2", "rpo_alpha", "has it already"),
        ("dpo", "chat_template=x chat_template_path=llama3", "model.chat_template", "both given"),
        ("dpo", "f_divergence_type=revers_kl", "f_divergence_type", "did you mean `reverse_kl`?"),
        ("dpo", "f_divergence_type=js_divergence loss_type=aot", "f_divergence_type", "`aot`"),
        ("dpo", "loss_type=exo_pair", "label_smoothing", "must be above 0"),
        ("dpo", "loss_type=robust label_smoothing=0.5", "label_smoothing", "below 0.5"),
        ("sample", "judge=null", "scorer.reward_model", "is required (or `scorer.judge`)"),
        ("sample", "reward_model=org/r", "scorer.judge", "are both given"),
        ("sample", "judge=numbr", "scorer.judge", "did you mean `number`?"),
        ("sample", "pair_rule=best_wrst", "pairs.pair_rule", "did you mean `best_worst`?"),
        ("sample", "keep_best=5 num_generations=4", "pairs.keep_best", "more than the 4"),
        ("eval", "judge=null", "judge", "is required (or `reward_model`)"),
        ("eval", "judge=exat", "judge", "did you mean `exact`?"),
        ("eval", "reference=c", "reference", "names no entry of `models`"),
        ("eval", "baseline=bb", "baseline", "did you mean `b`?"),
        ("eval", "best_of.a=4", "best_of", "needs a reward model"),
        ("eval", "best_of.c=4 reward_model=org/r", "best_of.c", "names no entry of `models`"),
    ],
)
def test_values_that_do_not_go_together(kind, overrides, key, words):
    sets = [text.replace("~", " ") for text in re.split(r" (?=[a-z_0-9.]+=)", overrides)]
    with pytest.raises(AlignError) as caught:
        load(kind, *sets)
    (problem,) = caught.value.problems
    assert words in str(problem)
    leaf = key.rpartition(".")[2]
    assert (
        f"`{key}`" in problem.message or leaf in problem.message or "r.yaml" in str(problem.where)
    )


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("sft", ["load_in_4bit=true"]),
        ("sft", ["load_in_4bit=true", "adapter_name_or_path=org/a", "adapter_mode=continue"]),
        ("sft", ["eval_strategy=steps", "test_split_size=0.1"]),
        ("sft", ["dataset_name=null", "datasets=[{path: org/a, weight: 1}]"]),
        ("sft", ["warmup_steps=20"]),
        ("dpo", ["loss_type=[sigmoid, sft]", "loss_weights=[1, 0.5]"]),
        ("dpo", ["loss_type=exo_pair", "label_smoothing=0.001"]),
        ("sample", ["judge=null", "reward_model=org/r"]),
        ("eval", ["best_of.a=4", "reward_model=org/r", "reference=a", "baseline=b"]),
    ],
)
def test_values_that_go_together(kind, overrides):
    assert load(kind, *overrides).stage == kind


def test_a_wrong_value_is_not_told_twice():
    with pytest.raises(AlignError) as caught:
        load("sft", "dataset_name=[1]")
    assert len(caught.value.problems) == 1
    with pytest.raises(AlignError) as caught:
        load("sft", "load_in_4bit=maybe", "load_in_8bit=true")
    assert len(caught.value.problems) == 1


@pytest.mark.slow
def test_names_are_those_of_the_libraries():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames
    from trl.trainer.dpo_trainer import DPOTrainer

    assert set(names.SCHEDULERS) == {item.value for item in SchedulerType}
    assert set(names.OPTIMIZERS) == {item.value for item in OptimizerNames}
    assert set(names.TRACKERS) == set(INTEGRATION_TO_CALLBACK)
    source = inspect.getsource(DPOTrainer)
    assert set(names.DPO_LOSSES) == set(re.findall(r'if loss_type == "(\w+)"', source))
    assert set(names.F_DIVERGENCES) == set(re.findall(r'f_divergence_type == "(\w+)"', source))
    losses = re.search(r"f_divergence_loss_types = \{(.*?)\}", source, re.S)
    assert losses is not None
    assert set(names.F_DIVERGENCE_LOSSES) == set(re.findall(r'"(\w+)"', losses[1]))
