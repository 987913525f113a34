"""Rounds: written out as stages, with what each starts from, its prompts and the data it keeps."""

from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align.config.load import load_pipeline
from align.config.references import references
from align.config.rounds import part_of
from align.data.sources import SLICE, _cut
from align.errors import AlignError

TEXT = """\
output_dir: runs/r
rounds:
  number: 3
  stages: [samples, reward, sft, dpo]
  policy: dpo
  first: $seed
  start: org/base
  keep: {reward: all, dpo: 2}
  prompts: {samples: 100}
stages:
  seed:
    stage: sft
    model: {model_name_or_path: org/base}
    data: {dataset_name: org/chats}
    merge_adapter: true
  samples:
    stage: sample
    model: {model_name_or_path: $previous}
    data: {dataset_name: org/prompts, dataset_train_split: "train[:1000]"}
    scorer: {judge: exact}
  reward:
    stage: reward
    model: {model_name_or_path: org/base}
    data: {dataset_name: $samples/pairs.jsonl}
  sft:
    stage: sft
    model: {model_name_or_path: $start}
    data: {dataset_name: $samples/sft.jsonl}
    merge_adapter: true
  dpo:
    stage: dpo
    model: {model_name_or_path: $sft}
    data: {dataset_name: $samples/pairs.jsonl}
    merge_adapter: true
  eval:
    stage: eval
    models: {seed: $seed, one: $dpo@1, last: $dpo}
    data: {dataset_name: org/prompts}
    judge: exact
    reward_model: $reward
"""
BLOCK = ["samples", "reward", "sft", "dpo"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(text: str = TEXT, *overrides: str, **options):
    Path("p.yaml").write_text(text, encoding="utf-8")
    return load_pipeline("p.yaml", overrides, **options)


def configs(text: str = TEXT, *overrides: str):
    return {name: stage.config for name, stage in load(text, *overrides).stages.items()}


def problems(text: str, *overrides: str):
    with pytest.raises(AlignError) as caught:
        load(text, *overrides)
    return list(caught.value.problems)


def paths(config) -> list[str]:
    data = config.data
    return [data.dataset_name] if data.dataset_name else [one.path for one in data.datasets]


def test_rounds_are_written_out_in_order():
    loaded = load()
    expected = [f"{name}@{number}" for number in (1, 2, 3) for name in BLOCK]
    assert list(loaded.stages) == ["seed", *expected, "eval"]
    assert list(loaded.chosen) == list(loaded.stages)
    assert loaded.stages["dpo@2"].config.output_dir == str(Path("runs/r/dpo@2"))


def test_each_round_begins_anew_and_samples_from_the_last_policy():
    found = configs()
    assert {found[f"sft@{n}"].model.model_name_or_path for n in (1, 2, 3)} == {"org/base"}
    sampled = [found[f"samples@{n}"].model.model_name_or_path for n in (1, 2, 3)]
    assert sampled == ["$seed", "$dpo@1", "$dpo@2"]
    assert found["dpo@3"].model.model_name_or_path == "$sft@3", "its reference is this round's SFT"
    assert found["eval"].models == {"seed": "$seed", "one": "$dpo@1", "last": "$dpo@3"}
    assert found["eval"].reward_model == "$reward@3"


def test_rounds_may_go_on_with_the_last_policy():
    found = configs(TEXT, "rounds.start=previous")
    started = [found[f"sft@{n}"].model.model_name_or_path for n in (1, 2, 3)]
    assert started == ["$seed", "$dpo@1", "$dpo@2"]


def test_without_a_first_policy_the_start_is_the_first():
    found = configs(TEXT.replace("  first: $seed\n", ""))
    assert found["samples@1"].model.model_name_or_path == "org/base"
    assert found["samples@2"].model.model_name_or_path == "$dpo@1"


def test_kept_data_grow_with_the_rounds():
    found = configs()
    pairs = [f"$samples@{n}/pairs.jsonl" for n in (1, 2, 3)]
    assert [paths(found[f"reward@{n}"]) for n in (1, 2, 3)] == [pairs[:1], pairs[:2], pairs]
    assert [paths(found[f"dpo@{n}"]) for n in (1, 2, 3)] == [pairs[:1], pairs[:2], pairs[1:]]
    assert paths(found["sft@3"]) == ["$samples@3/sft.jsonl"]
    everything = configs(TEXT, "rounds.keep=all")
    assert paths(everything["sft@3"]) == [f"$samples@{n}/sft.jsonl" for n in (1, 2, 3)]


def test_kept_entries_of_a_mixture_share_its_weight_and_keep_their_own_keys():
    mixture = """datasets: [{path: org/chats, weight: 3}, {path: $samples/sft.jsonl, weight: 1}]"""
    text = TEXT.replace("dataset_name: $samples/sft.jsonl", mixture)
    entries = configs(text, "rounds.keep.sft=all")["sft@2"].data.datasets
    assert [(one.path, one.weight) for one in entries] == [
        ("org/chats", 3),
        ("$samples@1/sft.jsonl", 0.5),
        ("$samples@2/sft.jsonl", 0.5),
    ]


def test_a_stage_after_the_rounds_may_read_all_of_them():
    more = "  final: {stage: sft, model: {model_name_or_path: org/base}, "
    text = TEXT + more + "data: {dataset_name: $samples/sft.jsonl}}\n"
    assert paths(configs(text)["final"]) == ["$samples@3/sft.jsonl"]
    text = text.replace("{reward: all,", "{final: all, reward: all,")
    assert paths(configs(text)["final"]) == [f"$samples@{n}/sft.jsonl" for n in (1, 2, 3)]


def test_prompts_are_shared_out():
    splits = [configs()[f"samples@{n}"].data.dataset_train_split for n in (1, 2, 3)]
    assert splits == ["train[0:100]", "train[100:200]", "train[200:300]"]
    text = TEXT.replace("prompts: {samples: 100}", "prompts: split")
    splits = [configs(text)[f"samples@{n}"].data.dataset_train_split for n in (1, 2, 3)]
    assert splits == ["train[0:333]", "train[333:666]", "train[666:1000]"]
    text = text.replace("prompts: split", "prompts: same")
    assert configs(text)["samples@3"].data.dataset_train_split == "train[:1000]"
    assert configs()["seed"].data.dataset_train_split == "train", "outside the rounds: all"


def test_any_stage_may_be_named_to_get_its_part():
    text = TEXT.replace("$samples/sft.jsonl", "org/chats").replace("{samples: 100}", "{sft: split}")
    splits = [configs(text)[f"sft@{n}"].data.dataset_train_split for n in (1, 2, 3)]
    assert splits == [
        "train[0%:33.33333333%]",
        "train[33.33333333%:66.66666667%]",
        "train[66.66666667%:100%]",
    ]
    assert configs(text)["samples@1"].data.dataset_train_split == "train[0:333]", "they draw"


def test_the_origin_says_the_line_and_the_rule():
    origins = load().origins
    assert origins["sft@2.model.model_name_or_path"] == "p.yaml:7", "what `rounds.start` says"
    assert origins["samples@2.model.model_name_or_path"] == "p.yaml:18"
    assert origins["reward@2.data.datasets"] == "p.yaml:24 (rounds.keep: p.yaml:8)"
    where = "p.yaml:19 (rounds.prompts: p.yaml:9)"
    assert origins["samples@2.data.dataset_train_split"] == where
    assert load(TEXT, "rounds.start=org/other").origins["sft@2.model.model_name_or_path"] == "--set"


def test_what_differs_in_one_round():
    text = TEXT + "  dpo@2: {beta: 0.3, trainer: {max_steps: 5}}\n"
    found = configs(text, "dpo@3.beta=0.5", "sft.trainer.max_steps=7")
    assert [found[f"dpo@{n}"].beta for n in (1, 2, 3)] == [0.1, 0.3, 0.5]
    assert [found[f"sft@{n}"].trainer.max_steps for n in (1, 2, 3)] == [7, 7, 7]
    assert list(found)[-1] == "eval", "such an entry is no stage of its own"


def test_optional_stages_of_rounds_run_in_all_of_them():
    text = TEXT.replace(
        "    judge: exact\n    reward_model",
        "    judge: exact\n    optional: true\n    reward_model",
    )
    extra = "  check: {stage: eval, optional: true, models: {a: $sft}, data: {dataset_name: o/p}, judge: exact}\n"
    text = text.replace("  eval:\n", extra + "  eval:\n").replace("sft, dpo]", "sft, dpo, check]")
    assert "check@1" not in load(text).chosen
    assert {"check@1", "check@2", "check@3"} < set(load(text, with_stages=["check"]).chosen)
    assert "check@2" in load(text, with_stages=["check@2"]).chosen


def test_a_number_is_enough_where_nothing_is_handed_on():
    text = TEXT.split("rounds:")[0] + "rounds: 2\nstages:\n"
    text += "  a: {stage: sft, model: {model_name_or_path: org/b}, data: {dataset_name: org/c}, merge_adapter: true}\n"
    text += "  b: {stage: sft, model: {model_name_or_path: $a}, data: {dataset_name: org/c}}\n"
    found = configs(text)
    assert list(found) == ["a@1", "b@1", "a@2", "b@2"]
    assert found["b@2"].model.model_name_or_path == "$a@2"
    assert list(configs(text, "rounds=1")) == ["a@1", "b@1"]


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("number: 3", "number: 0", 3, "`rounds.number` must be a whole number"),
        ("number: 3", "number: true", 3, "`rounds.number` must be a whole number"),
        ("policy: dpo", "policy: dop", 5, "did you mean `dpo`?"),
        ("policy: dpo", "polcy: dpo", 5, "did you mean `rounds.policy`?"),
        ("policy: dpo", "policy: seed", 5, "names no stage of a round"),
        ("sft, dpo]", "stf, dpo]", 4, "did you mean `sft`?"),
        ("[samples, reward, sft, dpo]", "[samples, sft, dpo]", 4, "must stand together"),
        ("[samples, reward, sft, dpo]", "[reward, samples, sft, dpo]", 4, "and in their order"),
        ("keep: {reward: all", "keep: {rewrd: all", 8, "did you mean `reward`?"),
        ("keep: {reward: all", "keep: {reward: most", 8, "`rounds.keep`"),
        ("first: $seed", "first: $sed", 6, "names no stage: `$sed`"),
        ("  policy: dpo\n", "", 17, "needs `rounds.policy`"),
        ("  start: org/base\n", "", 26, "needs `rounds.start`"),
        ("models: {seed: $seed,", "models: {seed: $previous,", 37, "in a round only"),
        ('"train[:1000]"', '"train[:150]"', 19, "has no rows left for round 3"),
        ('"train[:1000]"', '"train+validation"', 19, "is no single split"),
        ("one: $dpo@1", "one: $dpo@4", 37, "names no stage: `$dpo@4`"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_line(old, new, line, words):
    assert old in TEXT
    found = problems(TEXT.replace(old, new, 1))
    assert any(words in str(problem) for problem in found), [str(problem) for problem in found]
    assert line in {problem.line for problem in found}
    assert len({str(problem) for problem in found}) == len(found), "each is told once"
    assert not any("`?`" in str(problem) or "org/model" in str(problem) for problem in found)
    if line < 10:
        assert all("$previous" not in str(problem) for problem in found), "no errors that follow"


def test_names_that_mean_something_else_and_rounds_that_are_not():
    assert "no stage can have that name" in str(problems(TEXT.replace("seed:", "start:"))[0])
    text = TEXT + "  dpo@7: {beta: 0.3}\n"
    assert "is no stage of the 3 rounds" in str(problems(text)[0])
    text = TEXT + "  dpo@2: {stage: sft}\n"
    assert "`stage` and `recipe` belong to `dpo`" in str(problems(text)[0])


def test_a_mistake_in_a_stage_of_the_rounds_is_told_once():
    (problem,) = problems(
        TEXT.replace("  dpo:\n    stage: dpo\n", "  dpo:\n    stage: dpo\n    beta: x\n")
    )
    assert (problem.key, problem.line) == ("dpo.beta", 32)


def test_every_reference_leads_to_an_earlier_stage():
    loaded = load()
    seen: list[str] = []
    for name, stage in loaded.stages.items():
        assert all(found.stage in seen for found in references(stage.config))
        seen.append(name)


keys = st.sampled_from(
    ["number", "stages", "policy", "first", "start", "keep", "prompts", "reward", "sft", "zzz"]
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 5)
    | st.sampled_from(["all", "split", "dpo", "$seed", "$", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=5,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.dictionaries(keys, values, max_size=5) | values,
    st.lists(st.tuples(keys, st.text(max_size=5)), max_size=1),
)
def test_whatever_is_given_are_rounds_or_problems(given_rounds, sets):
    data = yaml.safe_load(TEXT)
    if isinstance(given_rounds, dict):
        given_rounds = data["rounds"] | given_rounds
    text = yaml.safe_dump(data | {"rounds": given_rounds}, sort_keys=False)
    with suppress(AlignError):
        loaded = load(text, *(f"rounds.{key}={value}" for key, value in sets))
        assert loaded.chosen


@given(
    rows=st.integers(1, 5000),
    rounds=st.integers(1, 99),
    split=st.sampled_from(["train", "train[10%:]", "train[:37.5%]", "train[0:ROWS]"]),
)
def test_parts_cover_the_split_once(rows, rounds, split):
    split = split.replace("ROWS", str(rows))

    def indices(text: str) -> list[int]:
        match = SLICE.fullmatch(text)
        assert match
        return list(range(rows))[_cut(match[2], rows, 0) : _cut(match[3], rows, -1)]

    if split.endswith(f":{rows}]") and rows < rounds:
        with pytest.raises(ValueError, match="no rows left"):
            [part_of(split, number, "split", rounds) for number in range(1, rounds + 1)]
        return
    parts = [part_of(split, number, "split", rounds) for number in range(1, rounds + 1)]
    assert [index for part in parts for index in indices(part)] == indices(split)
