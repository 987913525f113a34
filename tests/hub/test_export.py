"""Exported folders: the same model, configs that other readers understand, complete or absent."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from adapters import write_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from align.cli import main
from align.errors import AlignError
from align.hub.export import Export, export

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
IDS = torch.tensor([[0, 2, 40, 50, 60, 70, 4] * 20])


@pytest.fixture
def rows(tmp_path: Path) -> str:
    file = tmp_path / "rows.jsonl"
    texts = [{"instruction": f"Count {n} boats.", "output": f"{n} boats."} for n in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return str(file)


@pytest.fixture
def run(llama: Path, tmp_path: Path, rows: str) -> Path:
    """A finished run with an adapter and a system text of its own."""
    folder = tmp_path / "runs" / "dpo"
    write_adapter(folder / "artifact", llama)
    data = {"dataset_name": rows, "system_prompt": "Be brief."}
    (folder / "recipe.yaml").write_text(json.dumps({"stage": "sft", "data": data}))
    return folder


def logits(folder: Path | str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(IDS).logits


def read(file: Path) -> dict:
    return json.loads(file.read_text())


@pytest.mark.parametrize("form", ["gguf", "vllm", "ollama"])
def test_an_adapter_is_merged_with_its_proof(run, tmp_path, form):
    out = tmp_path / "out"
    done = export(Export(str(run), out, form))
    assert done["merge"]["kl_mean"] < 1e-3
    assert done["merge"] == read(out / "merge_report.json")
    for name, digest in done["merge"]["files"].items():
        from align.lineage import file_sha256

        assert file_sha256(out / name) == digest, f"{name} is not the one of the report"
    assert set(done["files"]) == {file.name for file in out.iterdir()}
    text = "".join(file.read_text() for file in out.iterdir() if file.suffix != ".safetensors")
    assert str(tmp_path) not in text
    assert out.name in done["commands"][0]
    assert (out / "Modelfile").exists() == (form == "ollama")
    assert not [path for path in tmp_path.iterdir() if "exporting" in path.name]


def test_both_generations_of_readers_find_rope_type_and_tokens(tokenizer, tmp_path):
    """transformers 4, llama.cpp and Ollama read `rope_theta` and `rope_scaling`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        rope_parameters=LLAMA3_ROPE,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    done = export(Export(str(tmp_path / "model"), out, "vllm", dtype="float32"))
    assert done["merge"] is None
    found = read(out / "config.json")
    assert found["rope_theta"] == 500000.0
    assert found["rope_scaling"]["rope_type"] == found["rope_scaling"]["type"] == "llama3"
    assert found["rope_scaling"]["factor"] == 8.0
    assert found["torch_dtype"] == found["dtype"] == "float32"
    assert found["use_cache"] is True
    assert torch.equal(logits(tmp_path / "model"), logits(out))
    tokens = read(out / "tokenizer_config.json")
    assert tokens["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(tokens.get("extra_special_tokens"), list)
    assert tokens["chat_template"] == (out / "chat_template.jinja").read_text()
    loaded = AutoTokenizer.from_pretrained(out)
    chat = [{"role": "user", "content": "Hi  <|eot_id|>"}, {"role": "assistant", "content": " A "}]
    assert loaded.apply_chat_template(chat) == tokenizer.apply_chat_template(chat)
    assert set(loaded.all_special_ids) == set(tokenizer.all_special_ids)
    assert "endgeneration" not in loaded.chat_template
    assert 4 in read(out / "generation_config.json")["eos_token_id"]


def test_a_full_model_is_rounded_and_numbers_out_of_range_are_refused(llama, tmp_path):
    export(Export(str(llama), tmp_path / "bf16", "vllm"))
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype="auto")
    own = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    for name, weight in own.state_dict().items():
        assert torch.equal(kept.state_dict()[name], weight.bfloat16()), name
    with torch.no_grad():
        own.model.norm.weight[0] = 1e6
    own.save_pretrained(tmp_path / "big")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "big")
    with pytest.raises(AlignError, match="no finite numbers in float16"):
        export(Export(str(tmp_path / "big"), tmp_path / "f16", "vllm", dtype="float16"))
    assert not (tmp_path / "f16").exists()


@pytest.mark.parametrize("sound", [True, False])
def test_a_model_s_own_generation_settings_stay_where_they_can(llama, tmp_path, sound):
    shutil.copytree(llama, tmp_path / "model")
    settings = {"eos_token_id": 9, "temperature": 0.6, "do_sample": sound}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    export(Export(str(tmp_path / "model"), tmp_path / "out", "vllm"))
    found = read(tmp_path / "out" / "generation_config.json")
    assert {1, 4, 9} <= set(found["eos_token_id"])
    assert found.get("temperature") == (0.6 if sound else None)


def test_the_modelfile_has_template_stops_and_system_text(run, tmp_path):
    export(Export(str(run), tmp_path / "out", "ollama"))
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith('FROM .\nTEMPLATE """{{')
    assert 'PARAMETER stop "<|eot_id|>"\n' in text
    assert 'PARAMETER stop "<|end_of_text|>"\n' in text
    assert text.endswith('SYSTEM """Be brief."""\n')
    assert read(tmp_path / "out" / "tokenizer_config.json")["add_bos_token"] is True
    export(Export(str(run), tmp_path / "none", "ollama", system=""))
    assert "SYSTEM" not in (tmp_path / "none" / "Modelfile").read_text()
    with pytest.raises(AlignError, match='holds """'):
        export(Export(str(run), tmp_path / "q", "ollama", system='a """ b'))
    assert not (tmp_path / "q").exists()


def test_an_adapter_for_vllm_comes_with_all_that_the_base_lacks(llama, rows, tmp_path):
    home = write_adapter(tmp_path / "adapter", llama, r=12, rank_pattern={"q_proj": 20})
    done = export(Export(str(home), tmp_path / "out", "vllm", adapter=True, name="mine"))
    (command,) = done["commands"]
    words = command.split()
    assert words[:3] == ["vllm", "serve", str(llama)]
    assert words[words.index("--max-lora-rank") + 1] == "32"
    out = str(tmp_path / "out")
    assert words[words.index("--lora-modules") + 1] == f"mine={out}"
    for flag in ("--tokenizer", "--generation-config"):
        assert words[words.index(flag) + 1] == out
    template = Path(words[words.index("--chat-template") + 1])
    assert template.is_file()
    assert "endgeneration" not in template.read_text()
    assert 4 in read(tmp_path / "out" / "generation_config.json")["eos_token_id"]
    assert "BASE_MODEL" in (tmp_path / "out" / "EXPORT.md").read_text()
    assert not (tmp_path / "out" / "base_identity.json").exists()
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    from peft import PeftModel

    with torch.no_grad():
        found = PeftModel.from_pretrained(model, out)(IDS).logits
        own = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), home
        )(IDS).logits
    assert torch.equal(found, own)


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"trainable_token_indices": [2, 3]}, {"bias": "lora_only"}]
)
def test_what_vllm_does_not_serve_is_refused(llama, tmp_path, settings):
    home = write_adapter(tmp_path / "adapter", llama, **settings)
    with pytest.raises(AlignError, match=f"does not serve adapters with {next(iter(settings))}"):
        export(Export(str(home), tmp_path / "out", "vllm", adapter=True))
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_failures_leave_nothing(run, tmp_path):
    kept = tmp_path / "out" / "mine.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    with pytest.raises(AlignError, match="nothing is overwritten"):
        export(Export(str(run), kept.parent, "vllm"))
    assert kept.read_text() == "mine"
    with pytest.raises(AlignError, match="above 1e-12"):
        export(Export(str(run), tmp_path / "new", "vllm", max_kl=1e-12))
    stale = tmp_path / ".new.exporting"
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"half")
    export(Export(str(run), tmp_path / "new", "vllm"))
    assert not stale.exists()
    assert logits(tmp_path / "new").isfinite().all()


def test_a_reward_model_is_refused(llama, tokenizer, tmp_path):
    from transformers import AutoModelForSequenceClassification

    home = tmp_path / "reward"
    AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1).save_pretrained(home)
    tokenizer.save_pretrained(home)
    with pytest.raises(AlignError, match="is a reward model, but a policy"):
        export(Export(str(home), tmp_path / "out", "vllm"))


CONVERTER = """
import json, sys
from pathlib import Path
folder = Path(sys.argv[1])
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
assert (folder / "config.json").is_file() and list(folder.glob("*.safetensors"))
if options["--outtype"] == "q8_0":
    sys.exit("this type is not for tests")
Path(options["--outfile"]).write_text("GGUF " + options["--model-name"])
"""


def test_the_converter_of_a_llama_cpp_checkout_writes_the_file(run, tmp_path):
    """A stand-in with the converter's command line; benchmarks/results/export.md has the real one."""
    checkout = tmp_path / "llama.cpp"
    checkout.mkdir()
    (checkout / "convert_hf_to_gguf.py").write_text(CONVERTER)
    options = {"format": "gguf", "llama_cpp": checkout, "name": "../mine"}
    done = export(Export(str(run), tmp_path / "out", **options))
    assert done["gguf"] == "..-mine-bf16.gguf"
    assert (tmp_path / "out" / "..-mine-bf16.gguf").read_text() == "GGUF ../mine"
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert "mine-bf16.gguf" in done["commands"][0]
    with pytest.raises(AlignError, match="this type is not for tests"):
        export(Export(str(run), tmp_path / "q8", outtype="q8_0", **options))
    assert not (tmp_path / "q8").exists()
    shutil.rmtree(checkout)
    with pytest.raises(AlignError, match=r"no convert_hf_to_gguf\.py"):
        export(Export(str(run), tmp_path / "x", **options))


def test_the_command_says_how_to_go_on(run, tmp_path, capsys):
    words = ["export", str(run), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        main([*words, "--format", "gguff"])
    assert end.value.code == 2
    assert "one of gguf, vllm, ollama" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit) as end:
        main([*words, "--format", "gguf", "--name", "mine"])
    assert end.value.code in (0, None)
    out = capsys.readouterr().out
    assert "convert_hf_to_gguf.py" in out
    assert "KL to the adapter" in out
    assert sys.executable not in (tmp_path / "out" / "EXPORT.md").read_text()
