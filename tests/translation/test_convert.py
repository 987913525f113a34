"""Recipes of other tools become ours: what every key turns into, and that the result is valid."""

import dataclasses
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from align.config.load import load_stage
from align.config.yaml import parse
from align.errors import AlignError
from align.translation.kinds import tool_of
from align.translation.translate import TABLES, translate
from align.translation.writing import convert, recipe_text

CHECKOUT = Path(__file__).parents[2]
HANDBOOK = Path(__file__).parent / "handbook"
OLD = sorted(file for file in HANDBOOK.rglob("*.yaml") if "orpo" not in file.parts)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def made(text: str, name: str = "r.yaml", **options):
    return translate(parse(text, name), Path(name), **options)


def fates(text: str, **options) -> dict[str, str]:
    return {note.key: str(note) for note in made(text, **options).notes}


def converted(text: str, **options):
    """The config of a converted file."""
    Path("theirs.yaml").write_text(text, encoding="utf-8")
    Path("ours.yaml").unlink(missing_ok=True)
    result = convert(Path("theirs.yaml"), Path("ours.yaml"), **options)
    assert result.problems == ()
    return load_stage("ours.yaml", ready=False).config


FLAT = """\
model_name_or_path: org/base
dataset_name: org/rows
output_dir: out
"""


# --- the handbook's recipes -----------------------------------------------------------------


def test_there_are_21_recipes_for_old_trl():
    assert len(OLD) == 21


@pytest.mark.parametrize("file", OLD, ids=lambda file: file.relative_to(HANDBOOK).as_posix())
def test_a_recipe_for_old_trl_converts_and_validates(file):
    result = convert(file, Path("out.yaml"))
    assert result.problems == ()
    given = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert {note.key for note in result.made.notes} >= set(given), "a key without a note"
    assert [note for note in result.made.notes if note.fate == "unknown"] == []
    config = load_stage("out.yaml", ready=False).config
    assert config.stage == ("dpo" if "dpo" in file.parts else "sft")
    assert config.model.model_name_or_path == given["model_name_or_path"]
    assert config.trainer.learning_rate == given["learning_rate"]
    assert config.trainer.warmup_steps == 0.1
    assert config.lora.use_peft == given.get("use_peft", False)
    if "max_seq_length" in given:
        assert config.data.max_length == given["max_seq_length"]


@pytest.mark.parametrize("file", OLD, ids=lambda file: file.relative_to(HANDBOOK).as_posix())
def test_a_recipe_for_old_trl_runs_as_it_is(file):
    """The same values, whether it is converted first or not, and mistakes have its own lines."""
    convert(file, Path("out.yaml"))
    flat = load_stage(file, ready=False)
    assert flat.config == load_stage("out.yaml", ready=False).config
    line = file.read_text(encoding="utf-8").splitlines().index("seed: 42") + 1
    assert flat.origins["trainer.seed"].endswith(f"{file.name}:{line}")
    assert any("renamed" in note for note in flat.notes)


def test_a_method_that_is_not_offered_is_said():
    orpo = HANDBOOK / "mixtral" / "orpo" / "config_full.yaml"
    with pytest.raises(AlignError, match="ORPO, which align does not offer"):
        convert(orpo, Path("out.yaml"))
    assert not Path("out.yaml").exists()
    result = convert(orpo, Path("out.yaml"), stage="dpo")
    assert result.problems == ()
    for keys, method in (
        ("desirable_weight: 1.0\n", "KTO"),
        ("reward_funcs: [x]\n", "GRPO"),
    ):
        with pytest.raises(AlignError, match=f"{method}, which"):
            made(FLAT + keys)


def test_mixtures_keep_their_shares():
    data = converted((HANDBOOK / "smollm" / "sft" / "config.yaml").read_text(), stage="sft").data
    splits = [entry.split for entry in data.datasets]
    assert splits == ["train", "train[:50%]", "train[:2.5%]"]
    assert data.test_split_size == 0.01


def test_a_split_for_evaluation_is_kept():
    data = load_stage(HANDBOOK / "zephyr" / "dpo" / "config_full.yaml", ready=False).config.data
    assert (data.dataset_name, data.dataset_train_split, data.dataset_test_split) == (
        "HuggingFaceH4/ultrafeedback_binarized",
        "train_prefs",
        "test_prefs",
    )


# --- TRL --------------------------------------------------------------------------------------


def test_every_key_of_trl_is_known():
    """No field of TRL's own configs is `unknown`."""
    import trl
    from trl.scripts.utils import DatasetMixtureConfig

    stages = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig, "reward": trl.RewardConfig}
    for stage, config in stages.items():
        kinds = (config, trl.ModelConfig, trl.ScriptArguments, DatasetMixtureConfig)
        names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
        text = FLAT + "".join(f"{name}: null\n" for name in sorted(names) if name not in FLAT)
        notes = made(text, tool="trl", stage=stage).notes
        assert [note.key for note in notes if note.fate == "unknown"] == []


def test_what_goes_into_extra_is_taken_by_trl(tmp_path):
    """Arguments without a key of their own: the trainer's own config has each of them."""
    import trl

    from align.training.arguments import OWNED, ROWS
    from align.translation.rules import Extra

    kinds = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig, "reward": trl.RewardConfig}
    for tool in ("trl", "llamafactory", "axolotl"):
        for key, rule in TABLES[tool].items():
            if isinstance(rule, Extra):
                assert key not in OWNED | ROWS
                for stage in rule.stages:
                    known = {field.name for field in dataclasses.fields(kinds[stage])}
                    assert key in known, (stage, key)


def test_the_defaults_that_are_written_out_are_trls():
    import trl

    from align.translation import trl_rules

    kinds = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig, "reward": trl.RewardConfig}
    for stage, kind in kinds.items():
        both = (kind, trl.ModelConfig)
        theirs = {field.name: field.default for each in both for field in dataclasses.fields(each)}
        table = {**trl_rules.DEFAULTS[""], **trl_rules.DEFAULTS.get(stage, {})}
        table |= trl_rules.ADAPTER_DEFAULTS | trl_rules.QUANTIZED_DEFAULTS
        for key, value in table.items():
            name = key.rpartition(".")[2]
            assert getattr(theirs[name], "value", theirs[name]) == value, key


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("torch_dtype: bfloat16", "model.dtype", "bfloat16"),
        ("max_seq_length: 77", "data.max_length", 77),
        ("warmup_ratio: 0.25", "trainer.warmup_steps", 0.25),
        ("evaluation_strategy: no", "trainer.eval_strategy", "no"),
        ("optim: adamw_hf", "trainer.optim", "adamw_torch"),
        ("use_flash_attention_2: true", "model.attn_implementation", "flash_attention_2"),
        ("group_by_length: true", "trainer.train_sampling_strategy", "group_by_length"),
        ("accelerate_config: zero3", "launch.accelerate", "zero3"),
        ("lora_target_modules: all-linear", "lora.lora_target_modules", "all-linear"),
        ("neftune_noise_alpha: 5", "trainer.extra", {"neftune_noise_alpha": 5}),
        ("chat_template: '{{ messages }}'", "model.chat_template", "{{ messages }}"),
        ("chat_template_path: llama3", "model.chat_template_path", "llama3"),
    ],
)
def test_a_key_under_its_old_name(line, key, value):
    found = made(f"{FLAT}packing: false\n{line}\n")
    assert found.values[key] == value


def test_of_two_names_for_one_thing_ours_wins():
    found = made(FLAT + "max_seq_length: 10\nmax_length: 20\npacking: true\n")
    assert found.values["data.max_length"] == 20
    assert (
        "overruled by `max_length`"
        in fates(FLAT + "max_seq_length: 10\nmax_length: 20\npacking: 1\n")["max_seq_length"]
    )


def test_evaluation_without_rows_is_left_out_for_a_local_file():
    Path("rows.jsonl").write_text('{"text": "x"}\n')
    text = "model_name_or_path: m\ndataset_name: rows.jsonl\noutput_dir: o\neval_strategy: steps\npacking: 1\n"
    found = made(text)
    assert "trainer.eval_strategy" not in found.values
    assert "no rows are held out" in fates(text)["eval_strategy"]
    assert made(text.replace("rows.jsonl", "org/x")).values["data.dataset_test_split"] == "test"


def test_an_unknown_key_is_noted_by_convert_and_refused_when_it_is_run():
    text = FLAT + "packing: true\nlerning_rate: 1e-5\n"
    assert "unknown" in fates(text)["lerning_rate"]
    Path("flat.yaml").write_text(text)
    with pytest.raises(AlignError) as caught:
        load_stage("flat.yaml", stage="sft")
    assert "flat.yaml:5" in str(caught.value)
    assert "did you mean `trainer.learning_rate`?" in str(caught.value)


def test_a_wrong_value_has_the_line_of_the_flat_file():
    Path("flat.yaml").write_text(FLAT + "torch_dtype: bfloat16\nlearning_rate: fast\n")
    with pytest.raises(AlignError) as caught:
        load_stage("flat.yaml", stage="sft")
    assert "flat.yaml:5: `trainer.learning_rate` must be" in str(caught.value)


def test_a_flat_file_that_says_nothing_needs_a_stage():
    with pytest.raises(AlignError, match="no key says what this recipe trains"):
        made(FLAT)
    assert made(FLAT, stage="reward").stage == "reward"
    assert made(FLAT, name="runs/dpo/r.yaml").stage == "dpo"


# --- telling, refusing, writing ---------------------------------------------------------------


def test_our_own_recipes_are_nobody_elses():
    from align.resources import shipped_recipes

    for recipe in shipped_recipes():
        assert tool_of(yaml.safe_load(recipe.path.read_text(encoding="utf-8"))) is None


def test_the_output_is_never_overwritten():
    Path("theirs.yaml").write_text(FLAT + "packing: true\n")
    Path("ours.yaml").write_text("mine\n")
    with pytest.raises(AlignError, match="nothing is overwritten"):
        convert(Path("theirs.yaml"), Path("ours.yaml"))
    assert Path("ours.yaml").read_text() == "mine\n"
    Path("link.yaml").symlink_to("nowhere.yaml")
    with pytest.raises(AlignError, match="nothing is overwritten"):
        convert(Path("theirs.yaml"), Path("link.yaml"))


def test_what_is_still_wrong_is_told_and_the_recipe_is_there():
    Path("theirs.yaml").write_text(FLAT + "packing: true\nlr_scheduler_type: wavy\n")
    result = convert(Path("theirs.yaml"), Path("ours.yaml"))
    assert "wavy" in str(result.problems[0])
    assert Path("ours.yaml").exists()
    with pytest.raises(AlignError):
        result.show()


def test_a_recipe_of_ours_is_refused():
    with pytest.raises(AlignError, match="is a recipe of align already"):
        made("stage: sft\noutput_dir: x\nmodel: {model_name_or_path: m}\n")
    with pytest.raises(AlignError, match="--from"):
        made("a: 1\n")


def test_paths_beside_the_old_file_are_found_from_the_new_one():
    Path("old").mkdir()
    Path("old/rows.jsonl").write_text('{"text": "x"}\n')
    Path("old/r.yaml").write_text(
        "model_name_or_path: m\ndataset_name: rows.jsonl\noutput_dir: o\npacking: 1\n"
    )
    assert convert(Path("old/r.yaml"), Path("new/r.yaml")).problems == ()
    found = yaml.safe_load(Path("new/r.yaml").read_text())
    assert Path(found["data"]["dataset_name"]).is_file()


@example({"accelerate_config": "\x85", "run_name": "a\nb\u2028c\r"})
@given(
    st.dictionaries(
        st.sampled_from(sorted({*TABLES["trl"], "odd key", "a\nb: 1", "x\u2028y", "\x1b[31m"})),
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(-5, 5000),
            st.floats(allow_nan=False, allow_infinity=False),
            st.text(max_size=20),
            st.lists(st.text(max_size=5), max_size=3),
            st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
        ),
        max_size=12,
    )
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_the_other_file_holds_the_result_is_yaml_with_its_values(theirs):
    """No value breaks out of its place, no key out of its comment, and no file a traceback."""
    text = yaml.safe_dump(
        {**theirs, "model_name_or_path": "m", "output_dir": "o"}, allow_unicode=False
    )
    try:
        found = made(text, tool="trl", stage="sft")
    except AlignError:
        return
    written = parse(recipe_text(found, "evil\nstage: dpo"), "ours.yaml")
    flat = {}
    for key, value in written.data.items():
        inside = isinstance(value, dict) and f"{key}" in (
            "model",
            "lora",
            "data",
            "trainer",
            "launch",
        )
        flat |= {f"{key}.{name}": item for name, item in value.items()} if inside else {key: value}
    assert flat == {"stage": "sft", **found.values}


def test_the_command(tmp_path):
    (tmp_path / "flat.yaml").write_text(FLAT + "packing: true\ntorch_dtype: bfloat16\n")
    words = [
        sys.executable,
        "-m",
        "align",
        "recipes",
        "convert",
        "flat.yaml",
        "--output",
        "ours.yaml",
    ]
    run = partial(
        subprocess.run,
        words,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},  # not an align that is installed elsewhere
        capture_output=True,
        text=True,
        check=False,
    )
    done = run()
    assert done.returncode == 0, done.stderr
    assert "torch_dtype: renamed to model.dtype" in done.stdout
    assert "dtype: bfloat16   # from torch_dtype" in (tmp_path / "ours.yaml").read_text()
    again = run()
    assert again.returncode == 2
    assert "overwritten" in again.stderr


def test_inspect_reads_a_flat_file_as_it_is():
    from align.selection import to_inspect

    Path("rows.jsonl").write_text('{"text": "x"}\n')
    Path("flat.yaml").write_text(
        "model_name_or_path: org/base\ndataset_name: rows.jsonl\noutput_dir: o\nmax_seq_length: 9\n"
    )
    loaded, config = to_inspect("flat.yaml", None, None, "sft")
    assert config.data.max_length == 9
    assert config.data.dataset_name.endswith("rows.jsonl")
    assert any("max_seq_length" in note for note in loaded.notes)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("none.yaml", "ours.yaml"), "no such file"),
        (("flat.yaml", "ours.txt"), "must end in .yaml"),
        (("flat.yaml", "ours.yaml", "--from", "axolotol"), "did you mean `axolotl`?"),
        (("flat.yaml", "ours.yaml", "--stage", "dop"), "did you mean `dpo`?"),
    ],
)
def test_mistakes_of_the_command(words, said, capsys):
    from align.cli import main

    Path("flat.yaml").write_text(FLAT)
    file, output, *more = words
    with pytest.raises(SystemExit) as ended:
        main(["recipes", "convert", file, "--output", output, *more])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not Path(output).exists()
