"""PPO recipes of TRL (both of its PPOs) and LLaMA-Factory become ours."""

from pathlib import Path

import pytest
import yaml

from align.config.load import load_stage
from align.config.yaml import parse
from align.errors import AlignError
from align.translation import ppo_rules
from align.translation.translate import translate
from align.translation.writing import convert


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def made(text: str, **options):
    return translate(parse(text, "r.yaml"), Path("r.yaml"), **options)


def fates(text: str, **options) -> dict[str, str]:
    return {note.key: str(note) for note in made(text, **options).notes}


def converted(text: str, **options):
    """The config of a converted file, which is valid, and in which every key left a note."""
    Path("theirs.yaml").write_text(text, encoding="utf-8")
    Path("ours.yaml").unlink(missing_ok=True)
    result = convert(Path("theirs.yaml"), Path("ours.yaml"), **options)
    assert result.problems == ()
    notes = {note.key for note in result.made.notes}
    assert set(yaml.safe_load(text)) <= notes
    assert [note.key for note in result.made.notes if note.fate == "unknown"] == []
    return load_stage("ours.yaml", ready=False).config


TRL = """\
model_name_or_path: EleutherAI/pythia-1b-deduped
sft_model_path: org/sft
reward_model_path: org/reward
dataset_name: org/prompts
dataset_test_split: validation
output_dir: out
learning_rate: 3e-6
per_device_train_batch_size: 8
gradient_accumulation_steps: 16
num_mini_batches: 4
num_ppo_epochs: 2
total_episodes: 30000
local_rollout_forward_batch_size: 16
response_length: 106
stop_token: eos
temperature: 0.9
missing_eos_penalty: 1.5
kl_coef: 0.1
kl_estimator: k3
cliprange: 0.3
cliprange_value: 0.1
vf_coef: 0.2
gamma: 0.99
lam: 0.9
whiten_rewards: true
num_sample_generations: 5
world_size: 2
use_peft: true
lora_r: 32
lora_dropout: 0.05
eval_strategy: steps
eval_steps: 100
run_name: mine
torch_dtype: bfloat16
push_to_hub: true
hub_model_id: org/ppo
"""


def test_trl():
    config = converted(TRL)
    assert config.stage == "ppo"
    assert config.model.model_name_or_path == "org/sft"
    assert config.scorer.reward_model == "org/reward"
    assert config.generation.max_new_tokens == 106
    assert config.generation.temperature == 0.9
    assert config.generation.generation_batch_size == 16
    assert config.missing_eos_penalty == 1.5
    assert (config.kl_coef, config.kl_estimator, config.lam, config.gamma) == (0.1, "k3", 0.9, 0.99)
    assert (config.cliprange, config.cliprange_value, config.vf_coef) == (0.3, 0.1, 0.2)
    assert config.whiten_rewards
    assert (config.num_ppo_epochs, config.total_episodes) == (2, 30000)
    assert config.lora.lora_dropout == 0
    assert config.trainer.extra == {"run_name": "mine"}
    assert config.hub.repo_id == "org/ppo"
    notes = fates(TRL)
    assert "the policy is `sft_model_path`" in notes["model_name_or_path"]
    assert "dropped" in notes["stop_token"]
    assert "ratio of probabilities noise" in notes["lora_dropout"]
    assert "`align eval` is a stage of its own" in notes["eval_strategy"]


@pytest.mark.parametrize(
    ("rows", "accumulated", "parts"), [(8, 16, 4), (8, 1, 1), (8, 2, 4), (6, 3, 2), (4, 4, 1)]
)
def test_a_rollout_stays_as_large_and_has_as_many_steps(rows, accumulated, parts):
    """TRL: a device draws batch x accumulation, in `num_mini_batches` steps; ours: that is a step's."""
    given = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulated}
    given |= {"num_mini_batches": parts}
    text = "reward_model_path: r\nsft_model_path: m\ndataset_name: d\noutput_dir: o\n"
    config = converted(text + yaml.safe_dump(given))
    ours = config.trainer
    step = ours.per_device_train_batch_size * ours.gradient_accumulation_steps
    assert step * config.num_mini_batches == rows * accumulated
    assert config.num_mini_batches == parts
    assert ours.per_device_train_batch_size <= rows, "no forward pass is larger"


def test_before_trl_017_minibatches_multiplied_a_rollout():
    """PPOv2's files are known by their keys; of others of that age the note says it."""
    text = "reward_model_path: r\nsft_model_path: m\ndataset_name: d\noutput_dir: o\n"
    text += "per_device_train_batch_size: 8\ngradient_accumulation_steps: 4\nnum_mini_batches: 2\n"
    old, new = converted(text + "non_eos_penalty: true\n"), converted(text)
    for config, accumulated in ((old, 4), (new, 2)):
        assert config.trainer.per_device_train_batch_size == 8
        assert config.trainer.gradient_accumulation_steps == accumulated
        assert config.num_mini_batches == 2


def test_what_trl_leaves_to_its_defaults_is_written_out():
    text = "reward_model_path: r\nsft_model_path: m\ndataset_name: d\noutput_dir: o\n"
    config = converted(text)
    assert config.trainer.learning_rate == config.value_learning_rate == 3e-6
    assert (config.num_ppo_epochs, config.num_mini_batches) == (4, 1)
    assert (config.generation.max_new_tokens, config.generation.temperature) == (53, 0.7)
    assert (config.reward_normalization, config.reward_clip) == ("none", None)
    assert config.missing_eos_penalty is None
    assert config.trainer.num_train_epochs == 3
    assert not config.lora.use_peft
    assert config.trainer.gradient_accumulation_steps == 1
    assert config.trainer.adam_epsilon == 1e-8


def test_ppo_v2_scores_unfinished_answers():
    text = "sft_model_path: m\nreward_model_path: r\ndataset_name: d\noutput_dir: o\nnum_ppo_epochs: 1\n"
    assert converted(text + "non_eos_penalty: true\n").missing_eos_score == -1.0
    both = text + "non_eos_penalty: true\npenalty_reward_value: -3\n"
    assert converted(both).missing_eos_score == -3.0
    assert converted(text + "non_eos_penalty: false\n").missing_eos_score is None


FIRST = """\
model_name: org/sft
reward_model: org/reward
query_dataset: org/prompts
output_dir: out
learning_rate: 1.41e-5
batch_size: 128
mini_batch_size: 8
gradient_accumulation_steps: 4
ppo_epochs: 3
steps: 4000
init_kl_coef: 0.1
adap_kl_ctrl: true
target: 4
horizon: 5000
kl_penalty: kl
early_stopping: true
target_kl: 0.1
use_score_scaling: true
use_score_norm: true
score_clip: 0.5
ratio_threshold: 10.0
log_with: wandb
seed: 1
max_grad_norm: 0.5
tracker_project_name: x
optimize_cuda_cache: true
"""


def test_trls_first_ppo():
    config = converted(FIRST, tool="trl", stage="ppo")
    assert config.model.model_name_or_path == "org/sft"
    assert config.scorer.reward_model == "org/reward"
    assert config.data.dataset_name == "org/prompts"
    trainer = config.trainer
    assert (trainer.per_device_train_batch_size, trainer.gradient_accumulation_steps) == (8, 4)
    assert config.num_mini_batches == 4
    assert (config.num_ppo_epochs, config.total_episodes) == (3, 4000)
    assert (config.kl_coef, config.kl_target, config.kl_horizon) == (0.1, 4.0, 5000)
    assert config.target_kl == pytest.approx(0.15)
    assert (config.reward_normalization, config.reward_clip) == ("first", 0.5)
    assert config.value_model == "policy"
    assert trainer.report_to == "wandb"


def test_a_fixed_coefficient_stays_fixed():
    base = "model_name: m\nreward_model: r\nquery_dataset: d\noutput_dir: o\n"
    fixed = converted(base + "adap_kl_ctrl: false\ntarget: 6\n", tool="trl", stage="ppo")
    assert (fixed.kl_coef, fixed.kl_target) == (0.2, None)
    adaptive = converted(base + "adap_kl_ctrl: true\n", tool="trl", stage="ppo")
    assert adaptive.kl_target == 6.0
    assert converted(base + "steps: 100\n", tool="trl", stage="ppo").kl_target == 6.0


LLAMAFACTORY = """\
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
reward_model: org/reward
reward_model_type: full
stage: ppo
do_train: true
finetuning_type: lora
lora_target: all
dataset: org/prompts
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
output_dir: out
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 1.0e-5
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
ppo_buffer_size: 4
ppo_epochs: 2
ppo_score_norm: true
ppo_target: 5.0
ppo_whiten_rewards: true
max_new_tokens: 512
top_k: 0
top_p: 0.9
"""


def test_llamafactory():
    config = converted(LLAMAFACTORY)
    assert config.stage == "ppo"
    assert config.scorer.reward_model == "org/reward"
    assert (config.num_mini_batches, config.num_ppo_epochs) == (4, 2)
    assert (config.kl_coef, config.kl_target) == (0.2, 5.0)
    assert config.reward_normalization == "first"
    assert config.whiten_rewards
    assert config.value_model == "policy"
    assert config.generation.max_new_tokens == 512
    assert config.generation.top_p == 1
    assert config.generation.temperature == 0.95
    assert config.lora.lora_r == 8
    assert config.trainer.extra == {"ddp_timeout": 180000000}
    assert "whole distribution" in fates(LLAMAFACTORY)["top_p"]


def test_a_reward_server_has_no_counterpart():
    text = LLAMAFACTORY.replace("reward_model_type: full", "reward_model_type: api")
    assert "a server scores nothing here" in fates(text)["reward_model_type"]


def test_keys_of_ppo_stay_unknown_elsewhere():
    sft = "model_name_or_path: m\ndataset_name: d\noutput_dir: o\npacking: true\nbatch_size: 8\n"
    assert "unknown" in fates(sft)["batch_size"]
    dpo = LLAMAFACTORY.replace("stage: ppo", "stage: dpo")
    assert "only PPO has it" in fates(dpo)["ppo_epochs"]


def test_a_flat_file_of_trl_runs_as_it_is():
    Path("flat.yaml").write_text(TRL)
    convert(Path("flat.yaml"), Path("ours.yaml"))
    flat = load_stage("flat.yaml", stage="ppo", ready=False)
    assert flat.config == load_stage("ours.yaml", ready=False).config
    assert flat.origins["kl_coef"] == f"flat.yaml:{TRL.splitlines().index('kl_coef: 0.1') + 1}"
    Path("flat.yaml").write_text(TRL + "kl_koef: 0.2\n")
    with pytest.raises(AlignError, match="did you mean `kl_coef`"):
        load_stage("flat.yaml", stage="ppo", ready=False)


PPO_CONFIG = (
    "num_mini_batches total_episodes local_rollout_forward_batch_size num_sample_generations"
    " response_length stop_token stop_token_id temperature missing_eos_penalty sft_model_path"
    " world_size num_total_batches micro_batch_size local_batch_size batch_size"
    " local_mini_batch_size mini_batch_size push_to_hub reward_model_path model_adapter_name"
    " ref_adapter_name num_ppo_epochs whiten_rewards kl_coef kl_estimator cliprange vf_coef"
    " cliprange_value gamma lam ds3_gather_for_generation exp_name"
)
"""Fields of TRL 1.12's PPOConfig beside those of TrainingArguments."""

FIRST_CONFIG = (
    "exp_name seed log_with task_name model_name query_dataset reward_model remove_unused_columns"
    " tracker_kwargs accelerator_kwargs project_kwargs tracker_project_name"
    " push_to_hub_if_best_kwargs steps learning_rate adap_kl_ctrl init_kl_coef kl_penalty target"
    " horizon gamma lam cliprange cliprange_value vf_coef batch_size forward_batch_size"
    " mini_batch_size gradient_accumulation_steps world_size ppo_epochs max_grad_norm"
    " optimize_cuda_cache optimize_device_cache early_stopping target_kl compare_steps"
    " ratio_threshold use_score_scaling use_score_norm score_clip whiten_rewards"
    " gradient_checkpointing is_encoder_decoder is_peft_model backward_batch_size"
    " global_backward_batch_size global_batch_size dataset_num_proc"
)
"""Fields of TRL 0.11's PPOConfig."""


@pytest.mark.parametrize("names", [PPO_CONFIG, FIRST_CONFIG], ids=["1.12", "0.11"])
def test_every_key_of_trls_configs_is_known(names):
    text = "model_name_or_path: m\noutput_dir: o\n"
    text += "".join(f"{name}: null\n" for name in names.split())
    notes = made(text, tool="trl", stage="ppo").notes
    assert [note.key for note in notes if note.fate == "unknown"] == []
    assert {note.key for note in notes} >= set(names.split())


def test_every_key_of_the_tables_means_something_here():
    from align.config.fields import config_class, leaf_fields
    from align.translation.rules import Joint, To

    known = {leaf.name for leaf in leaf_fields(config_class("ppo"))}
    for table in (ppo_rules.TRL, ppo_rules.LLAMAFACTORY):
        for key, rule in table.items():
            if isinstance(rule, To):
                assert rule.key in known, key
            if isinstance(rule, Joint):
                assert key in ppo_rules.JOINT, key
    for defaults in ppo_rules.DEFAULTS.values():
        assert set(defaults) <= known
