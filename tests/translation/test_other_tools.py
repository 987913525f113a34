"""LLaMA-Factory's and axolotl's recipes become ours."""

from pathlib import Path

import pytest
import yaml

from align.config.load import load_stage
from align.config.yaml import parse
from align.errors import AlignError
from align.translation.translate import translate
from align.translation.writing import convert


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def made(text: str):
    return translate(parse(text, "r.yaml"), Path("r.yaml"))


def fates(text: str) -> dict[str, str]:
    return {note.key: str(note) for note in made(text).notes}


def converted(text: str):
    """The config of a converted file."""
    Path("theirs.yaml").write_text(text, encoding="utf-8")
    result = convert(Path("theirs.yaml"), Path("ours.yaml"))
    assert result.problems == ()
    return load_stage("ours.yaml", ready=False).config


LLAMAFACTORY = """\
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true
quantization_bit: 4
### method
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 12
lora_target: all
pref_beta: 0.2
pref_loss: sigmoid
pref_ftx: 0.1
### dataset
dataset: dpo_en_demo,other
template: llama3
cutoff_len: 1500
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
### output
output_dir: saves/llama3
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
flash_attn: fa2
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
"""


def test_llamafactory():
    config = converted(LLAMAFACTORY)
    assert config.stage == "dpo"
    assert config.model.load_in_4bit
    assert config.model.attn_implementation == "flash_attention_2"
    assert config.model.chat_template_path == "llama3"
    assert (config.lora.lora_r, config.lora.lora_alpha) == (12, 24)
    assert config.beta == 0.2
    assert config.data.max_length == 1500
    assert config.data.test_split_size == 0.1
    assert [entry.path for entry in config.data.datasets] == ["dpo_en_demo", "other"]
    assert config.trainer.extra == {"ddp_timeout": 180000000}
    notes = fates(LLAMAFACTORY)
    assert set(yaml.safe_load(LLAMAFACTORY)) <= set(notes)
    assert not [text for text in notes.values() if ": unknown" in text]
    assert "dataset_info.json" in notes["dataset"]


def test_llamafactory_data_sets_are_looked_up_where_their_list_is():
    Path("data").mkdir()
    Path("data/dataset_info.json").write_text(
        '{"mine": {"file_name": "mine.json", "columns": {"prompt": "q", "response": "a"}},'
        ' "hub": {"hf_hub_url": "org/hub", "subset": "en", "split": "train_x"}}'
    )
    Path("data/mine.json").write_text('[{"q": "1", "a": "2"}]')
    config = converted(
        "stage: sft\nfinetuning_type: full\nmodel_name_or_path: org/m\ndataset: mine, hub\noutput_dir: o\n"
    )
    first, second = config.data.datasets
    assert first.path.endswith("data/mine.json")
    assert first.columns == {"instruction": "q", "output": "a"}
    assert (second.path, second.name, second.split) == ("org/hub", "en", "train_x")
    assert not config.lora.use_peft


def test_llamafactory_methods():
    base = "finetuning_type: lora\nmodel_name_or_path: m\ndataset: d\noutput_dir: o\n"
    assert made(base + "stage: rm\n").stage == "reward"
    assert made(base + "stage: pt\n").stage == "sft"
    with pytest.raises(AlignError, match="KTO"):
        made(base + "stage: kto\n")
    with pytest.raises(AlignError, match="SIMPO"):
        made(base + "stage: dpo\npref_loss: simpo\n")


AXOLOTL = """\
base_model: NousResearch/Meta-Llama-3-8B
model_type: LlamaForCausalLM
tokenizer_type: AutoTokenizer
load_in_8bit: false
load_in_4bit: true
strict: false
datasets:
  - path: aaditya/alpaca_subset_1
    type: alpaca
  - path: org/chats
    type: chat_template
    split: train_sft
    field_messages: dialogue
dataset_prepared_path: null
val_set_size: 0.05
output_dir: ./outputs/qlora-out
adapter: qlora
lora_model_dir:
sequence_len: 4096
sample_packing: true
pad_to_sequence_len: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules:
lora_target_linear: true
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
resume_from_checkpoint:
logging_steps: 1
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens:
  pad_token: "<|end_of_text|>"
"""


def test_axolotl():
    config = converted(AXOLOTL)
    assert config.stage == "sft"
    assert config.model.load_in_4bit
    assert config.lora.use_peft
    assert config.lora.lora_target_modules == "all-linear"
    assert config.data.packing
    assert config.data.test_split_size == 0.05
    assert config.trainer.per_device_train_batch_size == 2
    assert config.trainer.num_train_epochs == 4
    assert config.data.datasets[1].columns == {"messages": "dialogue"}
    notes = fates(AXOLOTL)
    assert set(yaml.safe_load(AXOLOTL)) <= set(notes)
    assert not [text for text in notes.values() if ": unknown" in text]


def test_axolotl_tools_and_marks():
    """The keys that align reads by itself need no word; another one has to be renamed in the rows."""
    entry = "  - {path: org/a, type: chat_template, field_tools: functions, message_field_training: KEY}"
    base = f"base_model: m\nmicro_batch_size: 1\noutput_dir: o\ndatasets:\n{entry}\n"
    config = converted(base.replace("KEY", "train"))
    assert config.data.datasets[0].columns == {"tools": "functions"}
    assert "marks in" not in fates(base.replace("KEY", "train"))["datasets"]
    assert "marks in `learn` are not read" in fates(base.replace("KEY", "learn"))["datasets"]


def test_axolotl_methods():
    base = "base_model: m\nmicro_batch_size: 1\ndatasets: [{path: org/p, type: chat_template}]\noutput_dir: o\n"
    assert made(base + "rl: dpo\nrl_beta: 0.3\n").values["beta"] == 0.3
    assert made(base + "rl: ipo\n").values["loss_type"] == "ipo"
    assert made(base + "reward_model: true\n").stage == "reward"
    with pytest.raises(AlignError, match="ORPO"):
        made(base + "rl: orpo\n")


@pytest.mark.parametrize("text", [LLAMAFACTORY, AXOLOTL], ids=["llamafactory", "axolotl"])
def test_other_tools_have_to_be_converted_before_they_run(text):
    Path("theirs.yaml").write_text(text)
    with pytest.raises(AlignError, match="align recipes convert"):
        load_stage("theirs.yaml", stage="sft")
