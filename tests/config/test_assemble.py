"""Pipelines: layers, hand-over by name, optional stages, every problem of every stage at once."""

from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align.config.load import load_pipeline
from align.config.references import produces, references, substitute
from align.errors import AlignError

STAGES = """\
  sft:
    stage: sft
    model: {model_name_or_path: org/base}
    data: {dataset_name: org/chats}
    merge_adapter: true
  pairs:
    stage: sample
    model: {model_name_or_path: $sft}
    data: {dataset_name: org/prompts}
    scorer: {judge: exact}
  reward:
    stage: reward
    model: {model_name_or_path: $sft}
    data: {dataset_name: $pairs/pairs.jsonl}
  dpo:
    stage: dpo
    optional: true
    model: {model_name_or_path: $sft}
    data: {dataset_name: $pairs/pairs.jsonl}
  eval:
    stage: eval
    models: {base: org/base, sft: $sft, tuned: $dpo}
    data: {dataset_name: org/prompts}
    judge: exact
    reward_model: $reward
    reference: sft
    best_of: {sft: 4, tuned: 4}
"""
BASE = f"output_dir: runs/p\nstages:\n{STAGES}"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(text: str = BASE, *overrides: str, **options):
    Path("p.yaml").write_text(text, encoding="utf-8")
    return load_pipeline("p.yaml", overrides, **options)


def problems(text: str, *overrides: str, **options):
    with pytest.raises(AlignError) as caught:
        load(text, *overrides, **options)
    return list(caught.value.problems)


def only(text: str, *overrides: str, **options) -> str:
    (problem,) = problems(text, *overrides, **options)
    return str(problem)


# --- layers -----------------------------------------------------------------------------------


def test_a_pipeline_gives_every_stage_a_folder_of_its_name():
    loaded = load()
    assert list(loaded.stages) == ["sft", "pairs", "reward", "dpo", "eval"]
    assert loaded.config.stages["sft"].config.output_dir == str(Path("runs/p/sft"))
    assert loaded.config.stages["dpo"].optional
    assert loaded.origins["sft.output_dir"] == "p.yaml:1"
    assert loaded.origins["sft.merge_adapter"] == "p.yaml:7"
    assert loaded.origins["output_dir"] == "p.yaml:1"
    moved = load(BASE, "output_dir=runs/q")
    assert moved.stages["eval"].config.output_dir == str(Path("runs/q/eval"))
    assert moved.origins["output_dir"] == "--set"


def test_layers_go_over_one_another():
    Path("base.yaml").write_text(
        "stage: sft\noutput_dir: runs/own\nmodel: {model_name_or_path: org/other}\n"
        "data: {dataset_name: org/own, max_length: 5}\ntrainer: {seed: 5, max_steps: 5}\n"
    )
    text = """
output_dir: runs/p
defaults:
  trainer: {seed: 1, max_steps: 1, save_steps: 1, logging_steps: 1}
stages:
  one: {recipe: base.yaml, trainer: {max_steps: 9}}
"""
    loaded = load(text, "one.trainer.save_steps=7", "defaults.logging_steps=3")
    trainer = loaded.stages["one"].config.trainer
    assert (trainer.seed, trainer.max_steps, trainer.save_steps) == (5, 9, 7)
    assert trainer.logging_steps == 3
    assert loaded.stages["one"].config.output_dir == str(Path("runs/p/one"))
    origins = loaded.stages["one"].origins
    assert origins["trainer.seed"] == "base.yaml:5"
    assert origins["trainer.max_steps"] == "p.yaml:6"
    assert origins["trainer.save_steps"] == "--set"


def test_defaults_reach_the_stages_that_have_the_key():
    text = BASE.replace(
        "stages:",
        "defaults:\n  seed: 3\n  trainer: {seed: 4}\n  generation: {max_new_tokens: 8}\nstages:",
    )
    stages = load(text).stages
    assert stages["sft"].config.trainer.seed == 4
    assert stages["pairs"].config.seed == 3
    assert stages["eval"].config.generation.max_new_tokens == 8
    stages = load(text, "defaults.seed=9").stages
    assert [stages[name].config.trainer.seed for name in ("sft", "reward", "dpo")] == [9, 9, 9]
    assert stages["eval"].config.seed == 9


def test_a_mixture_takes_the_place_of_a_shared_data_set_and_the_reverse():
    mixture = "{datasets: [{path: org/a}, {path: org/b}]}"
    text = BASE.replace("stages:", "defaults:\n  data: {dataset_name: org/all}\nstages:")
    found = load(text.replace("{dataset_name: org/chats}", mixture)).stages["sft"].config.data
    assert (found.dataset_name, len(found.datasets)) == (None, 2)
    text = BASE.replace("stages:", f"defaults:\n  data: {mixture}\nstages:")
    found = load(text).stages["sft"].config.data
    assert (found.dataset_name, found.datasets) == ("org/chats", None)
    both = BASE.replace("org/chats}", "org/chats, datasets: [{path: org/a}]}")
    assert "are both given" in only(both)


def test_overrides_name_a_stage_and_may_be_flat():
    stages = load(BASE, "sft.learning_rate=1e-3", "stages.dpo.beta=0.3").stages
    assert stages["sft"].config.trainer.learning_rate == 1e-3
    assert stages["dpo"].config.beta == 0.3


def test_a_relative_path_is_looked_for_beside_the_file_that_names_it(tmp_path):
    Path("sub").mkdir()
    Path("sub/rows.jsonl").write_text("{}\n")
    Path("sub/base.yaml").write_text("stage: sft\ndata: {dataset_name: rows.jsonl}\n")
    text = "output_dir: o\nstages: {a: {recipe: sub/base.yaml, model_name_or_path: org/b}}\n"
    found = load(text).stages["a"].config.data.dataset_name
    assert found == str(tmp_path / "sub" / "rows.jsonl")


# --- problems of the file ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stages:\n" + STAGES, "`output_dir` is required"),
        ("output_dir: [1]\nstages:\n" + STAGES, "`output_dir` must be text, got a list"),
        ("output_dir: o\nstages: {}\n", "must name at least one stage"),
        ("output_dir: o\nstages:\n", "must name at least one stage"),
        ("output_dir: o\nstages: {a: 1}\n", "`stages.a` must be a mapping, got `1`"),
        ("output_dir: o\nstages: {a: {}}\n", "`stages.a.stage` is required"),
        ("output_dir: o\nstages: {a: {stage: stf}}\n", "did you mean `sft`?"),
        ("output_dir: o\nstages: {a.b: {stage: sft}}\n", "is no name for a stage"),
        (BASE + "seed: 3\n", "goes under `defaults:`"),
        (BASE + "default: {}\n", "did you mean `defaults`?"),
        (BASE + "defaults: 3\n", "`defaults` must be a mapping"),
        (BASE + "defaults: {sed: 1}\n", "did you mean `defaults.seed`?"),
        (
            BASE + "defaults: {trainer: {max_stepz: 1}}\n",
            "`defaults.trainer.max_stepz` is a key of",
        ),
        (BASE.replace("optional: true", "optional: maybe"), "must be true or false"),
        (BASE.replace("merge_adapter: true", "output_dir: x"), "cannot be given here"),
        (BASE.replace("stage: reward", "stage: reward\n    recipe: no.yaml"), "no such recipe"),
    ],
)
def test_what_is_wrong_with_the_file(text, words):
    assert words in "\n".join(map(str, problems(text)))


def test_a_base_recipe_must_be_of_the_same_stage():
    Path("base.yaml").write_text("stage: dpo\n")
    text = BASE.replace("stage: reward", "stage: reward\n    recipe: base.yaml")
    assert "is a recipe for `dpo`, and the stage is `reward`" in str(problems(text)[0])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sft.learnin_rate=1", "did you mean `trainer.learning_rate`?"),
        ("stf.learning_rate=1", "did you mean `sft.learning_rate`?"),
        (
            "learning_rate=1",
            "name the stage: `sft.learning_rate`, or all: `defaults.learning_rate`",
        ),
        ("defaults.learnin_rate=1", "did you mean `defaults.trainer.learning_rate`?"),
        ("sft=1", "names no stage and no key"),
        ("sft.output_dir=x", "cannot be given here"),
        ("sft.stage=dpo", "cannot be set here"),
        ("dpo.optional=false", "cannot be set here"),
        ("zzz.yyy=1", "begin with a stage: sft, pairs"),
        ("sft.seed=x", "`sft.seed` must be a whole number"),
    ],
)
def test_what_is_wrong_with_an_override(override, words):
    assert words in only(BASE, override)


def test_a_mistake_in_the_defaults_is_told_once():
    text = BASE.replace("stages:", "defaults:\n  trainer: {seed: x}\nstages:")
    (problem,) = problems(text)
    assert (problem.key, problem.line) == ("defaults.trainer.seed", 3)


def test_mistakes_of_all_stages_come_at_once():
    text = BASE.replace("merge_adapter: true", "trainer: {sed: 1}").replace(
        "judge: exact", "judge: x"
    )
    keys = {problem.key for problem in problems(text)}
    assert {"sft.trainer.sed", "pairs.scorer.judge", "eval.judge"} <= keys


def test_a_stage_recipe_is_no_pipeline():
    found = only("stage: sft\n")
    assert "is no pipeline" in found
    assert "align sft --recipe p.yaml" in found


# --- references -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("model_name_or_path: $sft", "model_name_or_path: $stf", "did you mean `$sft`?"),
        ("models: {base: org/base,", "models: {base: $eval,", "refers to itself"),
        ("models: {base: org/base,", "models: {base: $reward,", "leaves a reward model"),
        ("models: {base: org/base,", "models: {base: $pairs,", "holds samples"),
        ("reward_model: $reward", "reward_model: $sft", "needs a reward model"),
        ("reward_model: $reward", "reward_model: $reward/x", "write `$reward`"),
        ("$pairs/pairs.jsonl", "$pairs", "write `$pairs/pairs.jsonl`"),
        ("$pairs/pairs.jsonl", "$pairs/sft.jsonl", "needs pairs"),
        ("$pairs/pairs.jsonl", "$pairs/nothing.jsonl", "write `$pairs/pairs.jsonl`"),
        ("$pairs/pairs.jsonl", "$sft", "leaves a policy"),
        (
            "tuned: $dpo}\n    data: {dataset_name: org/prompts",
            "tuned: $dpo}\n    data: {dataset_name: $reward",
            "leaves a reward adapter",
        ),
        ("org/chats", "$pairs/sft.jsonl", "the later stage `pairs`"),
        ("reward_model: $reward", "reward_model: $dpo", "add `--with dpo`"),
    ],
)
def test_references_that_do_not_fit(old, new, words):
    assert words in "\n".join(map(str, problems(BASE.replace(old, new, 1))))


def test_an_adapter_is_no_full_model_and_the_reverse():
    text = BASE.replace("    merge_adapter: true\n", "")
    found = str(problems(text)[0])
    assert "leaves an adapter" in found
    assert "`adapter_name_or_path: $sft` and `model_name_or_path: org/base`" in found
    assert "`merge_adapter: true` in `sft`" in found
    adapter = "model: {model_name_or_path: org/base, adapter_name_or_path: $sft}"
    load(text.replace("model: {model_name_or_path: $sft}", adapter))
    assert "leaves a full model" in str(
        problems(BASE.replace("model: {model_name_or_path: $sft}", adapter))[0]
    )


def test_full_fine_tuning_leaves_a_full_model():
    full = load(BASE.replace("    merge_adapter: true\n", "    lora: {use_peft: false}\n"))
    assert produces(full.stages["sft"].config) == "policy"


def test_answers_where_pairs_are_and_the_reverse():
    more = (
        "  rs: {stage: sft, model: {model_name_or_path: $sft}, data: {dataset_name: $pairs/FILE}}\n"
    )
    load(BASE + more.replace("FILE", "sft.jsonl"))
    assert "write `$pairs/sft.jsonl`" in only(BASE + more.replace("FILE", "pairs.jsonl"))


def test_text_that_begins_with_a_dollar_is_no_reference():
    given = load(BASE.replace("org/chats", "org/chats, system_prompt: $price"))
    assert given.stages["sft"].config.data.system_prompt == "$price"


def test_kinds_of_artifacts():
    stages = load(BASE, with_stages=["dpo"]).stages
    kinds = {name: produces(stage.config) for name, stage in stages.items()}
    assert kinds == {
        "sft": "policy",
        "pairs": "samples",
        "reward": "reward adapter",
        "dpo": "adapter",
        "eval": "results",
    }


def test_references_are_replaced_by_artifact_folders():
    config = load(BASE, with_stages=["dpo"]).stages["eval"].config
    folders = {name: Path("/runs") / name for name in ("sft", "dpo", "reward")}
    found = substitute(config, folders)
    assert found.models == {"base": "org/base", "sft": "/runs/sft", "tuned": "/runs/dpo"}
    assert found.reward_model == "/runs/reward"
    assert not references(found)
    assert found.model_fields_set == config.model_fields_set


# --- optional stages --------------------------------------------------------------------------


def test_models_of_stages_that_do_not_run_are_dropped():
    loaded = load()
    assert loaded.chosen == ("sft", "pairs", "reward", "eval")
    assert loaded.stages["eval"].config.models == {"base": "org/base", "sft": "$sft"}
    assert loaded.stages["eval"].config.best_of == {"sft": 4}
    loaded = load(BASE, with_stages=["dpo"])
    assert loaded.chosen == ("sft", "pairs", "reward", "dpo", "eval")
    assert loaded.stages["eval"].config.models["tuned"] == "$dpo"


def test_a_reference_to_a_model_that_is_dropped_is_told():
    text = BASE.replace("reference: sft", "reference: tuned")
    found = only(text)
    assert "names `tuned` of the stage `dpo`, which does not run" in found
    assert "`--with dpo`" in found
    load(text, with_stages=["dpo"])


def test_an_evaluation_of_nothing_is_told():
    text = BASE.replace("{base: org/base, sft: $sft, tuned: $dpo}", "{tuned: $dpo}")
    text = text.replace("    reference: sft\n    best_of: {sft: 4, tuned: 4}\n", "")
    assert "names only optional stages" in only(text)


def test_optional_stages_may_build_on_optional_stages():
    more = "  dpo2: {stage: dpo, optional: true, model: {model_name_or_path: org/base, "
    more += "adapter_name_or_path: $dpo}, data: {dataset_name: $pairs/pairs.jsonl}}\n"
    load(BASE + more)
    load(BASE + more, with_stages=["dpo", "dpo2"])
    assert "`--with dpo`" in only(BASE + more, with_stages=["dpo2"])


@pytest.mark.parametrize(
    ("name", "words"),
    [("dpp", "did you mean `--with dpo`?"), ("zzz", "optional stages: dpo")],
)
def test_unknown_stages_cannot_be_switched_on(name, words):
    assert words in only(BASE, with_stages=[name])


# --- anything at all --------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["$sft", "x", ""]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=5,
)
keys = st.sampled_from(
    [
        *("output_dir", "defaults", "stages", "sft", "eval", "stage", "recipe", "optional"),
        *("models", "model", "data", "lora", "model_name_or_path", "merge_adapter", "zzz"),
    ]
)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.dictionaries(keys, values, max_size=2),
    st.dictionaries(keys, values, max_size=3),
    st.lists(st.tuples(keys, keys, st.text(max_size=8)), max_size=2),
)
def test_whatever_is_given_is_a_pipeline_or_a_list_of_problems(top, stage, sets):
    data = yaml.safe_load(BASE)
    data["stages"]["sft"] |= stage
    with suppress(AlignError):
        loaded = load(
            yaml.safe_dump(data | top, sort_keys=False),
            *(f"{name}.{key}={value}" for name, key, value in sets),
        )
        assert loaded.chosen


# --- averages ---------------------------------------------------------------------------------

MORE = """\
  twin:
    stage: sft
    model: {model_name_or_path: org/base}
    data: {dataset_name: org/chats}
  other: {stage: sft, model: {model_name_or_path: org/base}, data: {dataset_name: org/chats}, trainer: {seed: 1}}
  mean: {stage: average, models: {a: $twin, b: $other}}
  user:
    stage: dpo
    model: {model_name_or_path: $mean}
    data: {dataset_name: $pairs/pairs.jsonl}
"""


def test_an_average_is_of_the_kind_of_its_models():
    def kind(**change: str) -> str:
        text = BASE + MORE.partition("  user")[0]
        for old, new in change.items():
            text = text.replace({"models": "{a: $twin, b: $other}"}.get(old, old), new)
        stages = {name: stage.config for name, stage in load(text).stages.items()}
        return produces(stages["mean"], stages)

    assert kind() == "adapter"
    assert kind(models="{a: $twin, b: $other}, method: merge") == "policy"
    assert kind(models="{a: $sft}, checkpoints: 3") == "adapter", (
        "of a run that merges its last one"
    )
    assert kind(models="{a: $sft}, checkpoints: 3, method: merge") == "policy"
    assert kind(models="{a: $reward}, checkpoints: 2") == "reward adapter"


def test_averages_are_checked_like_other_stages():
    found = only(BASE + MORE)
    assert "leaves an adapter" in found
    assert "`adapter_name_or_path: $mean` and `model_name_or_path: org/base`" in found
    load(BASE + MORE.replace("$other}", "$other}, method: merge"))
    mixed = MORE.partition("  user")[0].replace("{a: $twin,", "{a: $sft,")
    assert "is of the kind adapter, and the first model of the kind policy" in only(BASE + mixed)
    samples = MORE.partition("  user")[0].replace("{a: $twin,", "{a: $pairs,")
    assert "holds samples" in str(problems(BASE + samples)[0])
