"""What a user may call a model, and what is refused before anything is loaded."""

import json
from pathlib import Path

import pytest

from align.errors import AlignError
from align.models.source import Source, find_model, two_names


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(place: str, stage: str = "sft", **recipe) -> Path:
    folder = Path(place)
    (folder / "artifact").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(json.dumps({"stage": stage, **recipe}))
    return folder


def test_a_run_is_its_artifact():
    folder = run("runs/mine/dpo", "dpo", data={"system_prompt": "Be brief."})
    for given in (str(folder), f"{folder}/", str(folder / "artifact"), "dpo"):
        found = find_model(given)
        assert Path(found.path) == folder / "artifact"
        assert found.name == "dpo"
        assert found.system_prompt == "Be brief."
        assert not found.in_4bit


def test_a_run_on_4_bits_is_known_as_one():
    assert find_model(str(run("runs/q", model={"load_in_4bit": True}))).in_4bit


def test_an_average_is_talked_to_as_its_first_member_was_trained():
    first = run("runs/p/sft@1", model={"load_in_4bit": True}, data={"system_prompt": "Be brief."})
    mean = {"one": str(first / "artifact"), "two": "/gone/artifact"}
    run("runs/p/mean@2", "average", models=mean)
    found = find_model("mean@2")
    assert found.name == "mean@2"
    assert (found.in_4bit, found.system_prompt) == (True, "Be brief.")
    run("runs/p/far", "average", models={"gone": "/gone/artifact"})
    assert find_model("far").recipe == {}
    around = Path("runs/p/around").absolute()
    run(str(around), "average", models={"itself": str(around / "artifact")})
    assert find_model("around").recipe == {}


def test_a_model_folder_and_a_hub_id_name_themselves():
    Path("merged").mkdir()
    assert find_model("merged") == Source("merged", "merged")
    assert find_model("org/name") == Source("org/name", "name")
    assert find_model("org/name").system_prompt is None


def test_a_bare_name_that_two_runs_have_is_refused():
    run("runs/a/sft")
    run("runs/b/sft")
    with pytest.raises(AlignError, match="several runs") as caught:
        find_model("sft")
    assert "runs/a/sft, runs/b/sft" in str(caught.value)


def test_a_name_without_a_run_is_left_to_the_hub():
    run("runs/a/sft")
    assert find_model("gpt2").path == "gpt2"
    assert find_model("../sft").path == "../sft"


def test_an_unfinished_run_is_refused():
    Path("runs/a/sft.partial").mkdir(parents=True)
    with pytest.raises(AlignError, match="unfinished run"):
        find_model("runs/a/sft")


def test_a_pipeline_s_folder_names_its_models():
    run("runs/p/sft")
    kinds = {"sft": {"kind": "sft"}, "dpo": {"kind": "dpo"}, "eval": {"kind": "eval"}}
    Path("runs/p/pipeline.json").write_text(json.dumps({"stages": kinds}))
    with pytest.raises(AlignError, match="say which stage") as caught:
        find_model("runs/p")
    assert "one of runs/p/sft" in str(caught.value)
    assert "dpo" not in str(caught.value)


@pytest.mark.parametrize("stage", ["eval", "sample"])
def test_a_run_without_a_model_is_refused(stage):
    with pytest.raises(AlignError, match="leaves no model"):
        find_model(str(run("runs/x", stage)))


def test_two_models_never_have_one_name():
    one, two = (find_model(str(run(f"runs/{name}/sft"))) for name in "ab")
    assert two_names(one, two) == ("a/sft", "b/sft")
    assert two_names(one, find_model("org/x")) == ("sft", "x")
    assert two_names(one, one) == ("sft (A)", "sft (B)")
