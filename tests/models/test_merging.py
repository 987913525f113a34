"""Merged weights: the proof holds, measures what it says, and leaves nothing behind when it fails."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from adapters import write_adapter
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from align.cli import main
from align.errors import AlignError
from align.models.merging import REPORT, compare, merge

TEXTS = [{"text": f"The keeper counts {n} boats, then {n + 1}."} for n in range(20)]


@pytest.fixture
def rows(tmp_path: Path) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    return str(file)


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", llama)


def logits(model, ids=((0, 40, 50, 60, 70),)) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float()


def test_merged_weights_answer_as_the_adapter_does(adapter, llama, rows, tmp_path):
    report = merge(str(adapter), tmp_path / "merged", data=rows)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype is torch.bfloat16
    assert 0 < report["kl_mean"] < 1e-3
    assert report["greedy_agreement"] > 0.9
    assert json.loads((tmp_path / "merged" / REPORT).read_text()) == report
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    own = logits(PeftModel.from_pretrained(base, adapter))
    assert torch.allclose(logits(merged.float()), own, atol=0.2)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    stops = json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"]
    assert 4 in stops, "a chat model stops at the end of a turn"
    text = "".join(
        file.read_text(errors="replace") for file in (tmp_path / "merged").glob("*.json")
    )
    assert str(tmp_path) not in text
    assert str(llama) not in text


def test_in_float32_the_merge_is_exact(adapter, rows, tmp_path):
    report = merge(str(adapter), tmp_path / "merged", data=rows, dtype="float32")
    assert report["kl_mean"] < 1e-9
    assert report["greedy_agreement"] == 1


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_trained_token_rows_are_merged_too(make_llama, rows, tmp_path, tie):
    base = make_llama(5, tie=tie)
    trained = [2, 3, 4] if tie else {"embed_tokens": [2, 3, 4], "lm_head": [2, 3, 4]}
    model = AutoModelForCausalLM.from_pretrained(base)
    folder = write_adapter(tmp_path / "adapter", base, model, trainable_token_indices=trained)
    assert merge(str(folder), tmp_path / "m", data=rows, dtype="float32")["kl_mean"] < 1e-9


def test_a_proof_that_fails_leaves_nothing(adapter, rows, tmp_path, capsys):
    command = ["merge", str(adapter), "--output", str(tmp_path / "merged"), "--data", rows]
    with pytest.raises(SystemExit) as end:
        main([*command, "--max-kl", "1e-12"])
    assert end.value.code == 2
    assert "above 1e-12" in " ".join(capsys.readouterr().err.split())
    assert not [path for path in tmp_path.iterdir() if "merg" in path.name]
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code in (0, None)
    assert "same best token" in capsys.readouterr().out


def test_nothing_is_overwritten(adapter, rows, tmp_path):
    kept = tmp_path / "merged" / "mine.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    with pytest.raises(AlignError, match="nothing is overwritten"):
        merge(str(adapter), kept.parent, data=rows)
    assert kept.read_text() == "mine"


def test_what_a_killed_merge_left_is_no_part_of_the_next(adapter, rows, tmp_path):
    stale = tmp_path / ".merged.merging"
    stale.mkdir()
    (stale / "model-00001-of-00002.safetensors").write_bytes(b"half")
    merge(str(adapter), tmp_path / "merged", data=rows)
    assert not stale.exists()
    assert [file.name for file in (tmp_path / "merged").glob("*.safetensors")] == [
        "model.safetensors"
    ]


def test_a_foreign_base_is_refused(adapter, make_llama, rows, tmp_path):
    config = adapter / "adapter_config.json"
    other = {"base_model_name_or_path": str(make_llama(9))}
    config.write_text(json.dumps(json.loads(config.read_text()) | other))
    with pytest.raises(AlignError, match="other weights"):
        merge(str(adapter), tmp_path / "merged", data=rows)
    assert not (tmp_path / "merged").exists()


def test_without_text_there_is_no_merge(adapter, tmp_path):
    with pytest.raises(AlignError, match="no text") as caught:
        merge(str(adapter), tmp_path / "merged")
    assert "--data" in str(caught.value)


def test_a_full_model_is_no_adapter(llama, rows, tmp_path):
    with pytest.raises(AlignError, match="full model"):
        merge(str(llama), tmp_path / "merged", data=rows)


def test_a_nan_in_the_adapter_is_refused(llama, rows, tmp_path):
    folder = write_adapter(tmp_path / "adapter", llama, scale=float("nan"))
    with pytest.raises(AlignError, match=r"NaN|differs"):
        merge(str(folder), tmp_path / "merged", data=rows)
    assert not (tmp_path / "merged").exists()


def test_a_run_whose_rows_are_gone_asks_for_others(adapter, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(adapter, run / "artifact")
    recipe = {"stage": "sft", "data": {"dataset_name": str(tmp_path / "gone.jsonl")}}
    (run / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(AlignError, match=r"gone.jsonl: the run's own rows.*\n.*--data FILE"):
        merge(str(run), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_quantized_base_is_merged_into_the_full_weights(llama, rows, tmp_path):
    """The recipe says 4 bits: on demand it goes onto the weights before that, and the report says how far they are."""
    config = AutoConfig.from_pretrained(llama)
    config.update({"hidden_size": 64, "head_dim": 16, "intermediate_size": 128})  # 4 bits: by 64
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "base")
    llama = tmp_path / "base"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(llama)
    quantized = AutoModelForCausalLM.from_pretrained(
        llama, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    )
    run = tmp_path / "run"
    write_adapter(run / "artifact", llama, quantized)
    (run / "recipe.yaml").write_text(
        "stage: sft\n"
        f"model: {{model_name_or_path: {llama}, load_in_4bit: true}}\n"
        f"data: {{dataset_name: {rows}, test_split_size: 5}}\n"
    )
    report = merge(str(run), tmp_path / "merged", onto="original")
    assert report["kl_mean"] < 1e-3
    assert report["text"]["rows"] == "held out"
    assert report["text"]["texts"] == 5
    assert report["trained_quantized"]["kl_mean"] > 10 * report["kl_mean"]


def test_kl_is_that_of_two_distributions():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    found = compare([p.log()[None]], [q.log()[None]])
    assert found["kl_mean"] == pytest.approx(float((p * (p / q).log()).sum()))
    assert found["greedy_agreement"] == 0
