"""The model card: all of it from the run, text shown as text, and read back by the Hub's own parser."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from align.errors import AlignError
from align.hub.card import Upload, escape, model_card
from align.hub.facts import read_run
from align.hub.licences import LICENCES, llama_licence

UPLOAD = Upload("me/model", "me/base", "v1", adapter=True, reward=False, licence=None)


@pytest.fixture(scope="module")
def card(pipeline: Path) -> str:
    return str(model_card(read_run(pipeline / "sft"), UPLOAD))


def test_metadata_is_what_the_hub_expects(card, pipeline):
    data = ModelCard(card).data
    assert (data.base_model, data.library_name) == ("me/base", "peft")
    assert data.base_model_relation == "adapter"
    assert data.pipeline_tag == "text-generation"
    results = json.loads((pipeline / "eval/artifact/results.json").read_text())["rows"][0]
    mean = results["scores"]["score"]
    _, found = model_index_to_eval_results(data.to_dict()["model-index"])
    assert [item.metric_type for item in found] == ["score"]
    assert found[0].metric_value == pytest.approx(mean["mean"], abs=1e-6)
    assert found[0].metric_args["low"] == pytest.approx(mean["low"])
    assert found[0].metric_args["n"] == 8
    assert (found[0].dataset_name, found[0].dataset_split) == ("counting", "test")


def test_it_says_where_the_model_comes_from(card, pipeline):
    lineage = json.loads((pipeline / "sft/lineage.json").read_text())
    assert lineage["fingerprint"][:16] in card
    assert lineage["outputs"]["artifact"][:16] in card
    assert "| sft | counting | train | 8 | 8 | cc-by-4.0 |" in card
    assert "| trainer.learning\\_rate | 0.01 |" in card
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/model"' in card
    assert "vllm serve me/base --enable-lora" in card


def test_no_path_of_this_machine_is_in_it(card, pipeline, llama):
    for place in (pipeline, llama, Path.home(), Path.cwd()):
        assert str(place) not in card


def test_hostile_text_is_shown_and_does_nothing(card):
    assert "&lt;img src=x onerror=alert(1)&gt;" in card
    assert "\\x1b[2J&lt;/pre&gt;" in card
    for active in ("<img", "<script", "\x1b", "\u202e"):
        assert active not in card
    assert card.count("<pre>") == card.count("</pre>") == 6


def test_a_cell_stays_a_cell():
    assert escape("a|b\n*c* <d> `e` [f](g)") == ("a\\|b \\*c\\* &lt;d&gt; \\`e\\` \\[f\\](g)")


def test_the_way_of_several_stages_is_told_in_order(pipeline, tmp_path, run):
    """A run on the artifact of another: both are named, and the base of the first is the root."""
    later = tmp_path / "runs" / "later"
    lineage = json.loads((run / "lineage.json").read_text())
    (later / "artifact").mkdir(parents=True)
    for file in (run / "artifact").iterdir():
        (later / "artifact" / file.name).write_bytes(file.read_bytes())
    facts = {"key": "model.model_name_or_path", "kind": "model folder"}
    facts |= {"path": str(run / "artifact"), "sha256": lineage["outputs"]["artifact"]}
    mine = {"name": "dpo", "stage": "dpo", "fingerprint": "f" * 64, "inputs": [facts]}
    (later / "lineage.json").write_text(json.dumps(lineage | mine))
    (later / "recipe.yaml").write_text(
        f"stage: dpo\nmodel: {{model_name_or_path: {run / 'artifact'}}}\n"
    )
    found = read_run(later)
    assert [stage.name for stage in found.stages] == ["sft", "dpo"]
    assert found.roots == (found.stages[0].recipe["model"]["model_name_or_path"],)
    # Another model lies there now: the later run does not stand on it.
    lineage["outputs"]["artifact"] = "0" * 64
    lineage["outputs"]["files"] = {}
    (run / "lineage.json").write_text(json.dumps(lineage))
    assert [stage.name for stage in read_run(later).stages] == ["dpo"]


def test_an_evaluation_of_another_model_is_not_ours(run):
    file = run.parent / "eval" / "lineage.json"
    text = file.read_text()
    artifact = json.loads((run / "lineage.json").read_text())["outputs"]["artifact"]
    file.write_text(text.replace(artifact, "0" * 64))
    found = read_run(run)
    assert found.measured == ()
    assert found.samples == ()
    assert "has not been evaluated" in str(model_card(found, UPLOAD))


def test_what_is_no_run_is_refused(tmp_path, llama):
    with pytest.raises(AlignError, match="no complete run"):
        read_run(llama)


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("meta-llama/Meta-Llama-3-8B", "3"),
        ("meta-llama/Llama-3.1-8B-Instruct", "3.1"),
        ("meta-llama/Llama-3.2-1B", "3.2"),
        ("meta-llama/Llama-3.3-70B-Instruct", "3.3"),
        ("meta-llama/Llama-2-7b-hf", "2"),
        ("someone/llama-3-8b-bnb-4bit", "3"),
        ("openlm-research/open_llama_3b", None),
        ("huggyllama/llama-30b", None),
        ("TinyLlama/TinyLlama-1.1B", None),
        ("Qwen/Qwen3-8B", None),
    ],
)
def test_llama_is_known_by_its_name(name, version):
    assert llama_licence([name], {}) is (LICENCES[version] if version else None)


def test_llama_3_is_known_by_its_vocabulary_under_any_name():
    config = {"model_type": "llama", "vocab_size": 128256, "rope_parameters": {"factor": 8.0}}
    assert llama_licence(["me/base"], config) is LICENCES["3.1"]
    assert llama_licence(["me/base"], config | {"rope_parameters": {}}) is LICENCES["3"]
    assert llama_licence(["me/base"], config | {"vocab_size": 1024}) is None


def test_duties_of_the_llama_licence_are_in_the_card(pipeline):
    upload = Upload("me/Llama-3-x", "meta-llama/Meta-Llama-3-8B", None, True, False, LICENCES["3"])
    card = str(model_card(read_run(pipeline / "sft"), upload))
    assert ModelCard(card).data.license == "llama3"
    assert "**Built with Meta Llama 3**" in card
    assert "Copyright © Meta Platforms" in card
    assert LICENCES["3"].page in card
    assert LICENCES["3"].allows("Llama-3-x")
    assert not LICENCES["3"].allows("my-llama-3")
    assert LICENCES["3.1"].allows("Llama-3.1-x")
    assert LICENCES["2"].allows("anything")
