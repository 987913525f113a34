"""Recipes of one stage: lifting, precedence, origins, and every problem at once."""

from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align.config.draft import Override
from align.config.fields import config_class, leaf_fields
from align.config.load import load_stage
from align.config.problems import RecipeProblem, as_json
from align.errors import AlignError
from align.stages import STAGES

BASE = """\
stage: sft
output_dir: runs/x
model: {model_name_or_path: org/base}
data: {dataset_name: org/rows}
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def recipe(text: str, name: str = "r.yaml") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    return name


def problems(text: str, *overrides: str, **options) -> list[RecipeProblem]:
    with pytest.raises(AlignError) as caught:
        load_stage(recipe(text), overrides, **options)
    return list(caught.value.problems)


def messages(text: str, *overrides: str, **options) -> list[str]:
    return [str(problem) for problem in problems(text, *overrides, **options)]


def config(text: str = BASE, *overrides: str, **options):
    return load_stage(recipe(text), overrides, **options).config


# --- where keys may stand ---------------------------------------------------------------------


def test_a_flat_recipe_is_the_nested_one():
    flat = """
        stage: sft
        output_dir: runs/x
        model_name_or_path: org/base
        dataset_name: org/rows
        learning_rate: 1e-5
        lora_r: 8
        packing: true
        num_processes: 2
    """
    nested = """
        stage: sft
        output_dir: runs/x
        model: {model_name_or_path: org/base}
        data: {dataset_name: org/rows, packing: true}
        trainer: {learning_rate: 1e-5}
        lora: {lora_r: 8}
        launch: {num_processes: 2}
    """
    assert config(flat) == config(nested)
    assert config(flat).trainer.learning_rate == 1e-5


def test_dotted_keys_work_too():
    found = config(BASE + "trainer.learning_rate: 3e-4\ndata.columns.prompt: question\n")
    assert found.trainer.learning_rate == 3e-4
    assert found.data.columns == {"prompt": "question"}


def test_a_key_given_flat_and_nested_is_refused():
    (problem,) = problems(BASE + "learning_rate: 1e-5\ntrainer:\n  learning_rate: 2e-5\n")
    assert problem.key == "trainer.learning_rate"
    assert problem.line == 7
    assert "also as `learning_rate` in line 5" in problem.message


def test_empty_sections_are_no_problem():
    assert config(BASE + "trainer:\nlora: {}\n") == config()


def test_a_section_with_a_single_value_is_explained():
    (problem, *_) = problems(BASE.replace("model: {model_name_or_path: org/base}", "model: org/b"))
    assert problem.message == "`model` is a section with keys of its own, got `org/b`"
    assert problem.hint == "did you mean `model.model_name_or_path`?"


def test_every_bare_name_of_every_stage_finds_its_section():
    for kind in STAGES:
        leaves = leaf_fields(config_class(kind))
        bare = [leaf.leaf for leaf in leaves]
        assert len(bare) == len(set(bare)), f"{kind}: a bare name is in two sections"


# --- precedence and origins -------------------------------------------------------------------


def test_later_layers_win_and_origins_say_so():
    text = BASE + "trainer:\n  seed: 1\n  max_steps: 5\n  learning_rate: 1e-3\n"
    loaded = load_stage(
        recipe(text),
        ["trainer.seed=2", Override("trainer.max_steps", "6", "--max-steps"), "seed=3"],
    )
    assert (loaded.config.trainer.seed, loaded.config.trainer.max_steps) == (3, 6)
    assert loaded.origins["trainer.seed"] == "--set"
    assert loaded.origins["trainer.max_steps"] == "--max-steps"
    assert loaded.origins["trainer.learning_rate"] == "r.yaml:8"
    assert loaded.origins["model.model_name_or_path"] == "r.yaml:3"
    assert loaded.origins["lora.lora_r"] == "default"
    assert set(loaded.origins) == {leaf.name for leaf in leaf_fields(config_class("sft"))}


@pytest.mark.parametrize("name", ["pref_ftx", "nll_loss_coef", "sft_loss_weight"])
def test_the_nll_weight_goes_by_the_names_of_other_tools(name):
    base = BASE.replace("stage: sft", "stage: dpo")
    for loaded in (
        load_stage(recipe(f"{base}{name}: 0.2\n")),
        load_stage(recipe(base), [f"{name}=0.2"]),
    ):
        assert loaded.config.rpo_alpha == 0.2
        (note,) = loaded.notes
        assert f"`{name}` is called `rpo_alpha` here" in note
    (problem,) = problems(f"{base}rpo_alpha: 0.1\n{name}: 0.2\n")
    assert "is given twice" in problem.message
    assert "is no key of `sft`" in messages(f"{BASE}{name}: 0.2\n")[0]


def test_flags_win_over_set():
    loaded = load_stage(recipe(BASE), ["seed=1"], flags={"trainer.seed": 2})
    assert loaded.config.trainer.seed == 2


def test_overrides_alone_are_enough():
    sets = ["output_dir=runs/y", "model_name_or_path=org/base", "dataset_name=org/rows"]
    assert load_stage(None, sets, stage="sft").config.output_dir == "runs/y"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("learning_rate=1e-5", "trainer.learning_rate", 1e-5),
        ("trainer.max_steps=010", "trainer.max_steps", 10),
        ("packing=no", "data.packing", False),
        ("eval_strategy=no", "trainer.eval_strategy", "no"),
        ("bf16=null", "trainer.bf16", None),
        ("lora_target_modules=[q_proj, v_proj]", "lora.lora_target_modules", ["q_proj", "v_proj"]),
        ("lora_target_modules=q_proj", "lora.lora_target_modules", "q_proj"),
        ("system_prompt=You are: # kind", "data.system_prompt", "You are: # kind"),
        ("system_prompt=[INST] hi", "data.system_prompt", "[INST] hi"),
        ("system_prompt='quoted'", "data.system_prompt", "quoted"),
        ("model_revision=1234567", "model.model_revision", "1234567"),
        ("model_revision=7e10", "model.model_revision", "7e10"),
        ("dataset_config=2024", "data.dataset_config", "2024"),
        (
            "columns={prompt: q, completion: 12}",
            "data.columns",
            {"prompt": "q", "completion": "12"},
        ),
        ("columns.prompt=q", "data.columns", {"prompt": "q"}),
        ("extra.neftune_noise_alpha=5", "trainer.extra", {"neftune_noise_alpha": 5}),
        ("report_to=[wandb]", "trainer.report_to", ["wandb"]),
        ("max_length=null", "data.max_length", None),
        ("warmup_steps=0.1", "trainer.warmup_steps", 0.1),
    ],
)
def test_values_of_overrides_are_what_a_person_means(override, key, value):
    section, _, leaf = key.partition(".")
    found = getattr(getattr(config(BASE, override), section), leaf)
    assert found == value
    assert type(found) is type(value)


def test_numbers_where_text_is_wanted_keep_their_spelling():
    text = BASE.replace("org/base", "org/base, model_revision: 7e10") + "report_to: [1.0]\n"
    with pytest.raises(AlignError, match=r"names no tracker: `1\.0`"):
        config(text)
    assert config(text, "report_to=none").model.model_revision == "7e10"


def test_mappings_merge_with_set_and_are_replaced_by_a_whole_one():
    text = BASE.replace("dataset_name: org/rows", "dataset_name: org/rows, columns: {prompt: a}")
    assert config(text, "columns.completion=b").data.columns == {"prompt": "a", "completion": "b"}
    assert config(text, "columns={completion: b}").data.columns == {"completion": "b"}


def test_explicit_values_are_told_from_defaults():
    assert "num_processes" not in config().launch.model_fields_set
    assert "num_processes" in config(BASE, "num_processes=1").launch.model_fields_set


# --- problems ---------------------------------------------------------------------------------

BAD = """\
stage: sft
output_dir: runs/x
model:
  model_name_or_path: org/base
  torch_dtype: bf16
  dtype: bf16
  load_in_4bit: true
  load_in_8bit: true
lora: {lora_r: 0, lora_dropout: 1.5, lora_target_modules: {a: 1}}
data:
  datasets: [{path: a, wieght: 3}, {name: x}]
  dataset_name: ./no/file.jsonl
  max_length: many
  packing: maybe
trainer:
  learnin_rate: 2
  optim: adamw_tosch
  lr_scheduler_type: cosin
  seed: true
  max_steps: 1.5
  max_steps: 2
  report_to: [wandb, tensorbord]
merge_adaptor: true
"""


def test_all_problems_come_at_once_with_file_line_key_value_and_hint():
    found = {(p.line, p.key): p for p in problems(BAD, "lerning_rate=3")}
    expected = {
        (5, "model.torch_dtype"): "did you mean `model.dtype`?",
        (6, "model.dtype"): "did you mean `bfloat16`?",
        (8, "model.load_in_8bit"): "quantize to 4 or to 8 bits",
        (9, "lora.lora_r"): None,
        (9, "lora.lora_dropout"): None,
        (9, "lora.lora_target_modules"): None,
        (11, "data.datasets.0.wieght"): "did you mean `weight`?",
        (11, "data.datasets.1.path"): None,
        (12, "data.dataset_name"): f"looked in {Path.cwd()}",
        (13, "data.max_length"): None,
        (14, "data.packing"): None,
        (16, "trainer.learnin_rate"): "did you mean `trainer.learning_rate`?",
        (17, "trainer.optim"): "did you mean `adamw_torch`?",
        (18, "trainer.lr_scheduler_type"): "did you mean `cosine`?",
        (19, "trainer.seed"): None,
        (20, "trainer.max_steps"): None,
        (22, "trainer.report_to"): "did you mean `tensorboard`?",
        (23, "merge_adaptor"): "did you mean `merge_adapter`?",
        (None, "lerning_rate"): "did you mean `trainer.learning_rate`?",
    }
    assert {key: found[key].hint for key in expected if key in found} == expected
    assert found[11, "data.datasets.1.path"].message.endswith("is required")
    doubled = [p for p in found.values() if "given twice" in p.message]
    assert [(p.line, p.file) for p in doubled] == [(21, "r.yaml")]
    assert len(found) == len(expected) + 1


def test_problems_come_in_the_order_of_the_file():
    lines = [problem.line for problem in problems(BAD)]
    assert lines == sorted(lines)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("lora_r: 0", "`lora_r` must be a whole number, above 0, got `0`"),
        ("lora_r: x", "`lora_r` must be a whole number, above 0, got `x`"),
        ("lora_r: 1.5", "`lora_r` must be a whole number, above 0, got `1.5`"),
        ("lora_r: true", "`lora_r` must be a whole number, above 0, got `true`"),
        ("lora_r: []", "`lora_r` must be a whole number, above 0, got an empty list"),
        ("lora_r:", "`lora_r` must be a whole number, above 0, got nothing"),
        ("learning_rate: .inf", "`learning_rate` must be a number, above 0, got `inf`"),
        ("learning_rate: .nan", "`learning_rate` must be a number, above 0, got `nan`"),
        ("adam_beta1: 2", "`adam_beta1` must be a number, at least 0 and at most 1, got `2`"),
        ("packing: 3", "`packing` must be true or false, got `3`"),
        (
            "dtype: bf16",
            "`dtype` must be one of `auto`, `float32`, `bfloat16`, `float16`, got `bf16`",
        ),
        ("columns: [a]", "`columns` must be a mapping `{key: value}`, got a list"),
        ("columns: {a: [b]}", "`columns.a` must be text, got a list"),
        (
            "lora_target_modules: {a: 1}",
            "`lora_target_modules` must be text or a list of texts, got a mapping",
        ),
        ("trainable_token_indices: all", "must be `control` or a list of whole numbers, got `all`"),
        ("warmup_steps: 2.5", "`warmup_steps` is no number of steps: 2.5"),
    ],
)
def test_the_words_of_a_wrong_value(line, words):
    found = messages(BASE + line + "\n")
    assert len(found) == 1
    assert words in found[0]


def test_required_keys_are_named_with_their_sentence():
    found = {p.key: p for p in problems("stage: sft\n")}
    assert set(found) == {"output_dir", "model.model_name_or_path", "data.dataset_name"}
    assert found["model.model_name_or_path"].message.endswith("is required")
    assert "Hub id or folder" in found["model.model_name_or_path"].hint
    assert found["output_dir"].where == "r.yaml"


def test_a_recipe_must_be_for_the_stage_that_was_called():
    assert "is a recipe for `sft`, not for `dpo`" in messages(BASE, stage="dpo")[0]
    assert "did you mean `sft`?" in messages(BASE.replace("stage: sft", "stage: stf"))[0]
    assert "does not say which stage" in messages(BASE.replace("stage: sft\n", ""))[0]
    assert config(BASE.replace("stage: sft\n", ""), stage="sft") == config()


def test_a_pipeline_is_no_stage():
    assert "is a pipeline" in messages("output_dir: x\nstages: {a: {stage: sft}}\n")[0]


@pytest.mark.parametrize("text", ["novalue", "=3", " =3"])
def test_overrides_must_be_key_and_value(text):
    assert "is no KEY=VALUE" in messages(BASE, text)[0]


@pytest.mark.parametrize("text", ["trainer={seed: 1}", "trainer=5"])
def test_a_section_cannot_be_set_as_a_whole(text):
    assert "is a section with keys of its own" in messages(BASE, text)[0]


def test_problems_as_json_hold_file_line_key_value():
    (problem,) = problems(BASE + "lora_r: 0\n")
    assert as_json(problem) == {
        "file": "r.yaml",
        "line": 5,
        "key": "lora_r",
        "value": 0,
        "where": "r.yaml:5",
        "message": "`lora_r` must be a whole number, above 0, got `0`",
        "hint": None,
    }


# --- paths ------------------------------------------------------------------------------------


def test_paths_are_found_here_then_beside_the_recipe_then_among_what_ships(tmp_path):
    text = BASE.replace("org/rows", "rows.jsonl")
    recipe(text, "sub/r.yaml")
    Path("sub/rows.jsonl").write_text("{}\n")
    beside = load_stage("sub/r.yaml").config.data.dataset_name
    assert beside == str(tmp_path / "sub/rows.jsonl")
    Path("rows.jsonl").write_text("{}\n")
    assert load_stage("sub/r.yaml").config.data.dataset_name == str(tmp_path / "rows.jsonl")
    shipped = config(BASE.replace("org/base", "recipes/tiny/base")).model.model_name_or_path
    assert Path(shipped).is_absolute()
    assert (Path(shipped) / "config.json").is_file()


def test_what_is_no_path_stays_a_hub_id():
    assert config().model.model_name_or_path == "org/base"
    assert config(BASE, "model_name_or_path=gpt2").model.model_name_or_path == "gpt2"


@pytest.mark.parametrize("name", ["./x", "../x", "/no/x", "~/no/x", "a/b/c", "a\\b", "x/"])
def test_missing_folders_are_told_with_key_and_line(name):
    (problem,) = problems(BASE.replace("org/base", name))
    assert (problem.key, problem.line) == ("model.model_name_or_path", 3)
    assert "names no file or folder" in problem.message


@pytest.mark.parametrize(
    "name", ["a" * 300, f"{'a' * 300}/b", f"runs/{'a' * 300}", f"./{'a' * 300}"]
)
@pytest.mark.parametrize(
    "key",
    [
        "model.model_name_or_path",
        "model.adapter_name_or_path",
        "model.chat_template_path",
        "data.dataset_name",
        "launch.accelerate",
    ],
)
def test_a_name_that_no_file_can_have_is_told_or_left_to_the_hub(tmp_path, key, name):
    (tmp_path / "runs").mkdir()
    with suppress(AlignError):
        assert config(BASE, f"{key}={name}").model_dump()["stage"] == "sft"
        assert name.endswith("/b")  # a Hub organisation may be as long as it likes


def test_a_name_below_a_folder_that_is_here_is_no_hub_id(tmp_path):
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (problem,) = problems(BASE.replace("org/base", "runs/tinny"))
    assert problem.key == "model.model_name_or_path"
    assert "names no file or folder" in problem.message
    assert "did you mean `runs/tiny`?" in problem.hint
    assert config(BASE).model.model_name_or_path == "org/base"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "x.parquet", "./rows"])
def test_missing_data_files_are_told(name):
    (problem,) = problems(BASE.replace("org/rows", name))
    assert problem.key == "data.dataset_name"


def test_names_that_are_neither_are_refused():
    (problem,) = problems(BASE, "model_name_or_path=a b")
    assert "neither a file or folder here nor a Hub id" in problem.message


def test_runs_that_are_not_there_yet_are_told_apart():
    text = BASE.replace("org/base", "runs/sft/artifact")
    (problem,) = problems(text)
    assert "is not there yet" in problem.message
    assert problem.line == 3
    loaded = load_stage(recipe(text), ready=False)
    assert [note.key for note in loaded.pending] == ["model.model_name_or_path"]
    assert loaded.config.model.model_name_or_path == "runs/sft/artifact"


def test_the_run_folder_stays_relative_to_the_current_folder():
    recipe(BASE, "sub/r.yaml")
    assert load_stage("sub/r.yaml").config.output_dir == "runs/x"


def test_references_belong_into_pipelines():
    (problem,) = problems(BASE.replace("org/base", "$sft"))
    assert "refers to a stage (`$sft`)" in problem.message


def test_templates_and_accelerate_configs_by_name_or_file(tmp_path):
    assert config(BASE, "chat_template_path=llama3").model.chat_template_path == "llama3"
    assert config(BASE, "accelerate=fsdp2").launch.accelerate == "fsdp2"
    Path("mine.yaml").write_text("num_processes: 2\n")
    assert config(BASE, "accelerate=mine.yaml").launch.accelerate == str(tmp_path / "mine.yaml")
    assert "did you mean `fsdp2`?" in messages(BASE, "accelerate=fdsp2")[0]
    assert "`llama3`" in messages(BASE, "chat_template_path=lama3")[0]


# --- anything at all --------------------------------------------------------------------------

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**400, max_value=10**401)
    | st.floats()
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
keys = st.sampled_from(
    [leaf.name for leaf in leaf_fields(config_class("sft"))]
    + ["model", "trainer", "data", "stage", "zzz", "learning_rate", "", "a.b.c"]
)


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(keys, values, max_size=5), st.lists(st.tuples(keys, st.text(max_size=12))))
def test_whatever_is_given_is_a_config_or_a_list_of_problems(extra, sets):
    text = yaml.safe_dump({**yaml.safe_load(BASE), **extra}, allow_unicode=True)
    with suppress(AlignError):
        loaded = load_stage(recipe(text), [f"{key}={value}" for key, value in sets])
        assert loaded.config.model_dump()["stage"] == "sft"
