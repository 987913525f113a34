"""What ships, where paths are looked for, and copies that never overwrite."""

from pathlib import Path

import pytest

from align import resources
from align.config.load import load_pipeline
from align.errors import AlignError
from align.resources import (
    accelerate_config,
    accelerate_names,
    copy_recipe,
    display,
    find_path,
    find_recipe,
    shipped,
    shipped_recipes,
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "name",
    ["tiny/pipeline", "tiny/pipeline.yaml", "recipes/tiny/pipeline", "recipes/tiny/pipeline.yaml"],
)
def test_shipped_recipes_have_one_name_in_four_spellings(name):
    assert find_recipe(name) == shipped("recipes") / "tiny" / "pipeline.yaml"


def test_a_file_here_comes_before_a_shipped_one(here):
    (here / "tiny").mkdir()
    (here / "tiny/pipeline.yaml").write_text("stages: {}\n")
    assert find_recipe("tiny/pipeline") == here / "tiny" / "pipeline.yaml"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("tiny/pipelin", "did you mean `tiny/pipeline`?"),
        ("tiny", "one of tiny/pipeline"),
        ("recipes/tiny/", "one of tiny/pipeline"),
        ("zzzz", "`align recipes list`"),
        ("", "`align recipes list`"),
        ("a\0b", "`align recipes list`"),
        ("~nobody-of-that-name/x", "`align recipes list`"),
    ],
)
def test_missing_recipes_say_what_there_is(name, hint):
    with pytest.raises(AlignError) as caught:
        find_recipe(name)
    assert hint in str(caught.value)


def test_the_installed_layout(here, monkeypatch):
    package = here / "site" / "align"
    (package / "_shipped" / "recipes" / "x").mkdir(parents=True)
    (package / "_shipped" / "recipes" / "x" / "y.yaml").write_text("# Y.\nstage: sft\n")
    monkeypatch.setattr(resources, "_PACKAGE", package)
    assert shipped("recipes") == package / "_shipped" / "recipes"
    assert [(found.name, found.kind, found.summary) for found in shipped_recipes()] == [
        ("x/y", "sft", "Y.")
    ]
    assert find_path("recipes/x/y.yaml") == package / "_shipped" / "recipes" / "x" / "y.yaml"


def test_paths_of_data_sets_by_bare_name_only_where_asked():
    assert find_path("tiny-world") is None
    assert find_path("tiny-world", rooms=("datasets",)) == shipped("datasets") / "tiny-world"


def test_display_is_short_where_it_can_be(here):
    assert display(here / "a" / "b.yaml") == str(Path("a/b.yaml"))
    assert display(shipped("recipes") / "tiny" / "pipeline.yaml") == "recipes/tiny/pipeline.yaml"
    assert display(Path("/elsewhere/x")) == "/elsewhere/x"


def test_a_copied_pipeline_brings_its_stage_recipes_and_loads(here):
    copies = copy_recipe("llama3-8b/pipeline", here / "mine")
    names = {path.name for path in copies}
    assert names == {
        f"{n}.yaml" for n in ("pipeline", "sft", "reward", "sample", "dpo", "eval", "push")
    }
    loaded = load_pipeline(here / "mine" / "pipeline.yaml")
    assert loaded.origins["sft.model.model_name_or_path"].startswith("mine/sft.yaml:")


def test_nothing_is_overwritten(here):
    copy_recipe("tiny/pipeline")
    (here / "pipeline.yaml").write_text("mine\n")
    with pytest.raises(AlignError, match="nothing is overwritten"):
        copy_recipe("tiny/pipeline")
    assert (here / "pipeline.yaml").read_text() == "mine\n"
    (here / "sub").mkdir()
    (here / "sub" / "dpo.yaml").write_text("mine\n")
    with pytest.raises(AlignError, match="nothing is overwritten"):
        copy_recipe("llama3-8b/pipeline", here / "sub")
    assert [path.name for path in (here / "sub").iterdir()] == ["dpo.yaml"]
    assert copy_recipe("tiny/pipeline", Path("other.yaml")) == [Path("other.yaml")]


def test_accelerate_configs_by_name_and_by_file(here):
    assert accelerate_names() == ["ddp", "fsdp2", "zero3"]
    assert accelerate_config("ddp") == shipped("recipes") / "accelerate" / "ddp.yaml"
    (here / "mine.yaml").write_text("num_processes: 2\n")
    assert accelerate_config("mine.yaml") == here / "mine.yaml"
    assert accelerate_config("none") is None


def test_a_recipe_is_listed_with_a_whole_sentence() -> None:
    listed = {recipe.name: recipe.summary for recipe in resources.shipped_recipes()}
    assert listed["llama3-8b/sft"] == "Llama 3 8B, instruction SFT with LoRA on UltraChat."
    assert listed["llama3-8b/ppo"].endswith(".")  # over two lines of the file
    assert not [summary for summary in listed.values() if summary.endswith((",", " the"))]
