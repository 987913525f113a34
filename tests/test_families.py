"""Other families by the same recipes: every training stage on a tiny random model of each architecture."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer, ParamWrapper
from ppo_runs import figures, ppo_config
from torch.testing import assert_close
from transformers import GenerationConfig

from align.config.sections import ModelSection
from align.errors import AlignError
from align.generation.answers import stop_ids
from align.generation.sampler import sample_completions
from align.generation.scoring import token_logprobs
from align.models.loading import load_any_policy, load_policy
from align.models.merging import merge
from align.ppo.experience import Episode
from align.ppo.forward import Forward
from align.ppo.trainer import PPOTrainer
from align.runs import run_stage
from align.stages.dpo import DPOConfig
from align.stages.evaluate import EvalConfig
from align.stages.reward import RewardConfig
from align.stages.sample import SampleConfig
from align.stages.sft import SFTConfig
from align.training import fitting
from align.training.trainers import SFTTrainer

MOE = {"num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16}
LATENT |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("LlamaConfig", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    # A window that is shorter than the texts, as Mistral 7B v0.1 has one.
    "mistral": ("MistralConfig", {"sliding_window": 16, "tie_word_embeddings": False}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "sliding_window": None, **MOE}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "phi3": ("Phi3Config", {"sliding_window": 2048}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            **MOE,
            **LATENT,
        },
    ),
}
WITH_CODE = {"phi3", "deepseek_v3"}
"""Their repositories on the Hub bring code of their own, which is not run: transformers has these architectures."""
WITH_EXPERTS = {"mixtral", "deepseek_v3"}
SLOW = pytest.mark.slow

ATTENTION = {
    "phi3": "qkv_proj o_proj",
    "deepseek_v3": "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj",
}
MLP = {"phi3": "gate_up_proj down_proj"}


def adapted(family: str) -> dict[str, int]:
    """Adapted weights of the two layers -> rank, with rank 4 asked for.

    PEFT adapts experts and router, gives the joined gate and up projection twice the rank, and leaves out DeepSeek's
    shared expert and first dense layer.
    """
    found = {}
    for layer in (0, 1):
        names = ATTENTION.get(family, "q_proj k_proj v_proj o_proj").split()
        found |= {f"layers.{layer}.self_attn.{name}": 4 for name in names}
        if family not in WITH_EXPERTS:
            names = MLP.get(family, "gate_proj up_proj down_proj").split()
            found |= {f"layers.{layer}.mlp.{name}": 4 for name in names}
        elif family == "mixtral" or layer == 1:
            found |= {
                f"layers.{layer}.mlp.gate.weight": 4,
                f"layers.{layer}.mlp.experts.gate_up_proj": 8,
                f"layers.{layer}.mlp.experts.down_proj": 4,
            }
    return found


PROMPTS = [[0, 2, 40, 50, *range(60, 90)], [0, 60]]
COMPLETIONS = [[70, 80, 4], [90, 100, 110, 120]]


def logprobs(model: Any) -> torch.Tensor:
    found = token_logprobs(model, PROMPTS, COMPLETIONS)
    return torch.tensor([value for row in found for value in row])


def make_model(family: str, tokenizer: Any, folder: Path) -> Path:
    kind, own = FAMILIES[family]
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**shape | own)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if family in WITH_CODE:
        (folder / "modeling_own.py").write_text("raise SystemExit('code of the repository ran')")
        saved = json.loads((folder / "config.json").read_text())
        saved["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Model"}
        (folder / "config.json").write_text(json.dumps(saved))
    return folder


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


class Chain:
    """The stages of one family, each run once and read by several tests.

    `trained` holds the policies' log-probabilities when they were saved, `folded` those of the weights that PPO draws
    with, `ways` how PPO passed through the model.
    """

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.trained: dict[str, torch.Tensor] = {}
        self.folded: dict[str, torch.Tensor] = {}
        self.ways: dict[str, dict[str, bool]] = {}
        self.chats = write(
            folder / "chats.jsonl",
            [{"messages": [turn("user", f"say {n}"), turn("assistant", "a" * n)]} for n in (2, 3)],
        )
        self.pairs = write(
            folder / "pairs.jsonl",
            [
                {
                    "prompt": [turn("user", f"Name number {n}.")],
                    "chosen": [turn("assistant", f"It is {n}.")],
                    "rejected": [turn("assistant", "No" + "!" * n)],
                }
                for n in (1, 2)
            ],
        )

    def config(self, kind: Any, name: str, rows: str, **more: Any) -> Any:
        base: dict[str, Any] = {
            "output_dir": str(self.folder / name),
            "model": {"model_name_or_path": str(self.model)},
            "lora": {"lora_r": 4, "lora_alpha": 8},
            "data": {"dataset_name": rows, "max_length": 256},
            "trainer": {
                "per_device_train_batch_size": 2,
                "max_steps": 5,
                "learning_rate": 1e-2,
                "lr_scheduler_type": "constant",
                "warmup_steps": 0,
                "gradient_checkpointing": False,
                "logging_steps": 1,
            },
        }
        for key, value in more.items():
            base[key] = {**base[key], **value} if key in base and isinstance(value, dict) else value
        return kind.model_validate(base)

    def run(self, config: Any) -> Path:
        """The artifact of a stage that is run the first time that it is asked for."""
        output = Path(config.output_dir)
        if not output.exists():
            save = fitting.save_policy

            def saving(trainer: Any, *given: Any, **more: Any) -> None:
                model = trainer.accelerator.unwrap_model(trainer.model)
                if isinstance(trainer, PPOTrainer):
                    if trainer.roles.can_merge():
                        with trainer.roles.merged():
                            self.folded[output.name] = logprobs(trainer.roles.policy)
                    with trainer.roles.playing("policy") as policy:
                        self.trained[output.name] = logprobs(policy)
                    self.ways[output.name] = {
                        "padded": trainer.collector.forward.padded,
                        "own logits": trainer.collector.forward.own_logits,
                        "reward on the policy's base": "reward" in trainer.roles.adapters,
                        "value on the policy's base": "value" in trainer.roles.adapters,
                    }
                else:
                    self.trained[output.name] = logprobs(model)
                save(trainer, *given, **more)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(fitting, "save_policy", saving)
                run_stage(config, quiet=True)
        return output / "artifact"

    def start(self, name: str) -> dict[str, Any]:
        """What a recipe says to start from the base, an SFT model, an SFT adapter, or to train all weights."""
        if name == "merged":
            return {"model": {"model_name_or_path": str(self.merged())}}
        if name in ("continue", "stack"):
            adapter = {"adapter_name_or_path": str(self.sft()), "adapter_mode": name}
            return {"model": adapter}
        return {"lora": {"use_peft": False}} if name == "full" else {}

    def sft(self, name: str = "sft", **more: Any) -> Path:
        return self.run(self.config(SFTConfig, name, self.chats, **more))

    def merged(self) -> Path:
        return self.sft("merged", merge_adapter=True)

    def reward(self) -> Path:
        return self.run(self.config(RewardConfig, "reward", self.pairs))

    def dpo(self, name: str = "dpo", **more: Any) -> Path:
        return self.run(self.config(DPOConfig, name, self.pairs, **more))

    def ppo(self, name: str = "ppo", **more: Any) -> Path:
        given = {"scorer": {"reward_model": str(self.reward()), "reward_funcs": {}}} | more
        return self.run(
            ppo_config(self.model, self.folder, output_dir=str(self.folder / name), **given)
        )


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def chain(family: str, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp(family)
    return Chain(make_model(family, tokenizer, folder / "model"), folder)


def check_fell(artifact: Path) -> None:
    """Every loss is finite, and one batch that is seen five times is learnt."""
    found = figures(artifact.parent, "loss")
    assert len(found) == 5
    assert all(map(math.isfinite, found))
    assert found[-1] < 0.97 * found[0]


def check_loads_as_trained(chain: Chain, artifact: Path) -> None:
    loaded, _ = load_any_policy(str(artifact))
    found = logprobs(loaded)
    assert_close(found, chain.trained[artifact.parent.name], rtol=1e-4, atol=1e-4)
    before = load_policy(ModelSection(model_name_or_path=str(chain.model)))
    assert (found - logprobs(before)).abs().max() > 1e-2


def test_sft(chain):
    artifact = chain.sft()
    check_fell(artifact)
    check_loads_as_trained(chain, artifact)
    generation = json.loads((artifact / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [4, 1]


def test_lora_sits_where_peft_puts_it_and_all_of_it_is_trained(family, chain):
    model, _ = load_any_policy(str(chain.sft()))
    ranks = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            own = [] if not isinstance(layer, ParamWrapper) else [layer.parameter_name]
            kept = [part for part in name.split(".")[3:] if part != "base_layer"]
            ranks[".".join([*kept, *own])] = layer.r["default"]
            assert layer.lora_B["default"].weight.abs().max() > 0, name
    assert ranks == adapted(family)


def test_sft_of_control_tokens_begins_where_plain_sft_does_and_merges(family, chain):
    """Gemma scales its embeddings, which trained rows have to do too; Llama 2 and others have a head of their own."""
    control = {"lora_r": 4, "trainable_token_indices": "control"}
    artifact = chain.sft("control", lora=control)
    merged = chain.sft("control-merged", lora=control, merge_adapter=True)
    plain = figures(chain.sft().parent, "loss")
    assert figures(artifact.parent, "loss")[0] == pytest.approx(plain[0], rel=1e-5)
    for one in (artifact, merged):
        check_fell(one)
        check_loads_as_trained(chain, one)
    assert_close(chain.trained["control"], chain.trained["control-merged"], rtol=1e-3, atol=1e-3)


def test_sft_merged(chain):
    artifact = chain.merged()
    check_loads_as_trained(chain, artifact)
    assert_close(chain.trained["merged"], chain.sft() and chain.trained["sft"])
    config = json.loads((artifact / "config.json").read_text())
    assert not config.get("output_router_logits")
    assert "auto_map" not in config


def test_merge_proves_itself(chain):
    report = merge(str(chain.sft()), chain.folder / "one", dtype="float32")
    assert report["kl_max"] < 1e-6


def test_gradient_checkpointing_gives_the_same_policy(chain):
    chain.sft("checkpointed", trainer={"gradient_checkpointing": True})
    chain.sft()
    assert_close(chain.trained["checkpointed"], chain.trained["sft"], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_policy(chain, monkeypatch):
    step, calls = SFTTrainer.training_step, []

    def dying(*given: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError("on purpose")
        return step(*given, **more)

    monkeypatch.setattr(SFTTrainer, "training_step", dying)
    with pytest.raises(MemoryError):
        chain.sft("resumed", trainer={"save_steps": 2})
    chain.sft("resumed", trainer={"save_steps": 2})
    assert len(calls) == 4 + 3
    chain.sft()
    assert_close(chain.trained["resumed"], chain.trained["sft"], rtol=1e-5, atol=1e-5)


def test_reward(chain):
    artifact = chain.reward()
    check_fell(artifact)
    assert json.loads((artifact.parent / "summary.json").read_text())["reload_difference"] < 1e-4


STARTS = [
    "base",
    *(pytest.param(s, marks=SLOW) for s in ("merged", "continue", "stack", "full")),
]


@pytest.mark.parametrize("start", STARTS)
def test_dpo(chain, start):
    artifact = chain.dpo(f"dpo-{start}", **chain.start(start))
    assert figures(artifact.parent, "loss")[0] == pytest.approx(math.log(2), abs=1e-4)
    assert figures(artifact.parent, "rewards/chosen")[0] == pytest.approx(0, abs=1e-5)
    check_fell(artifact)
    check_loads_as_trained(chain, artifact)


@pytest.mark.parametrize("start", STARTS)
def test_ppo(chain, start):
    rate = {"trainer": {"learning_rate": 1e-3}} if start == "full" else {}
    artifact = chain.ppo(f"ppo-{start}", **chain.start(start), **rate)
    run = artifact.parent
    assert figures(run, "objective/kl")[0] == 0.0
    assert figures(run, "val/ratio")[0] == pytest.approx(1, abs=1e-4)
    assert all(map(math.isfinite, figures(run, "loss")))
    check_loads_as_trained(chain, artifact)
    assert chain.ways[f"ppo-{start}"] == {
        "padded": False,
        "own logits": False,
        "reward on the policy's base": start in ("base", "continue"),
        "value on the policy's base": start != "full",
    }
    if start != "full":
        folded = chain.folded[f"ppo-{start}"]
        assert_close(folded, chain.trained[f"ppo-{start}"], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_ppo_with_gradient_checkpointing_gives_the_same_policy(chain):
    chain.ppo("ppo-checkpointed", trainer={"gradient_checkpointing": True})
    chain.ppo("ppo-base")
    found = chain.trained["ppo-checkpointed"]
    assert_close(found, chain.trained["ppo-base"], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_the_shared_base_scores_as_the_reward_model_does(chain):
    apart = {"reward_model": str(chain.reward()), "reward_funcs": {}, "share_base": False}
    scores = [
        figures(run.parent, "objective/scores")[0]
        for run in (chain.ppo("ppo-base"), chain.ppo("ppo-apart", scorer=apart))
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_flat_passes_give_the_models_own_logits(chain):
    """With several texts of different lengths, one longer than Mistral's window."""
    model, _ = load_any_policy(str(chain.sft()))
    episodes = [
        Episode(0, prompt, completion, ended=False, text="")
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    forward = Forward(model, 1.0)
    assert forward.settle(model, episodes) < 1e-4
    assert not forward.padded
    assert not forward.own_logits
    flat = forward.batch(episodes, torch.device("cpu"))
    with torch.no_grad():
        assert_close(forward.completions(model, flat)[0], logprobs(model), rtol=1e-4, atol=1e-4)


def test_answers_are_those_of_generate_and_end_on_a_stop_token(chain):
    model, tokenizer = load_any_policy(str(chain.sft()))
    ends = [*stop_ids(model, tokenizer), *range(60, 262, 3)]
    assert ends[:2] == [4, 1]
    prompts = [[0, *range(40, 40 + n)] for n in (3, 9, 30)]
    drawn = sample_completions(
        model, prompts, max_new_tokens=24, temperature=0, stop_ids=ends, pad_id=5, batch_size=2
    )
    config = GenerationConfig(do_sample=False, max_new_tokens=24, eos_token_id=ends, pad_token_id=5)
    for prompt, (completion,) in zip(prompts, drawn, strict=True):
        ids = torch.tensor([prompt])
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
        )
        assert completion.all_ids == output[0, len(prompt) :].tolist()
        assert completion.ended == (output[0, -1].item() in ends)
        assert not set(completion.ids) & set(ends)
    assert any(completion.ended for (completion,) in drawn)


@pytest.mark.slow
def test_sample_and_eval(chain):
    """Rejection sampling and evaluation with the family's own adapters."""
    rows = [{"prompt": [turn("user", f"say {n}" + "!" * n)]} for n in range(6)]
    data = {"dataset_name": write(chain.folder / "asked.jsonl", rows)}
    sample = SampleConfig.model_validate(
        {
            "output_dir": str(chain.folder / "sample"),
            "model": {
                "model_name_or_path": str(chain.model),
                "adapter_name_or_path": str(chain.sft()),
            },
            "data": data,
            "generation": {"num_generations": 3, "max_new_tokens": 8},
            "scorer": {"reward_model": str(chain.reward())},
            "pairs": {"only_finished": False},
        }
    )
    report = json.loads((run_stage(sample, quiet=True) / "artifact" / "report.json").read_text())
    assert report["completions"] == 18
    assert report["pairs"] == 6
    evaluation = EvalConfig.model_validate(
        {
            "output_dir": str(chain.folder / "eval"),
            "models": {"base": str(chain.model), "sft": str(chain.sft())},
            "data": data,
            "generation": {"temperatures": [1.0], "max_new_tokens": 8},
            "reward_model": str(chain.reward()),
            "reference": "base",
        }
    )
    artifact = run_stage(evaluation, quiet=True) / "artifact"
    found = json.loads((artifact / "results.json").read_text())["rows"]
    assert [row["label"] for row in found] == ["base", "sft"]
    assert all(math.isfinite(row["reward"]["mean"]) for row in found)
    assert [row["kl"]["k3"]["mean"] > 0 for row in found] == [False, True]


@pytest.mark.parametrize("family", ["mixtral"], indirect=True)
def test_the_routers_loss_is_in_no_preference_loss_unless_asked_for(chain):
    """Of these families Mixtral alone has one in transformers."""
    assert figures(chain.sft().parent, "aux_loss")
    assert not figures(chain.reward().parent, "aux_loss")
    assert not figures(chain.dpo("dpo-base").parent, "aux_loss")
    asked = chain.dpo("dpo-router", trainer={"extra": {"router_aux_loss_coef": 0.5}}).parent
    router = figures(asked, "aux_loss")[0]
    assert router > 1
    assert figures(asked, "loss")[0] == pytest.approx(math.log(2) + 0.5 * router, abs=1e-3)


@pytest.mark.parametrize("family", sorted(WITH_EXPERTS), indirect=True)
@pytest.mark.parametrize("key", ["lora_dropout", "use_dora"])
@pytest.mark.parametrize("kind", [SFTConfig, RewardConfig, DPOConfig])
def test_what_peft_cannot_do_on_experts_is_refused(family, chain, kind, key):
    rows = chain.chats if kind is SFTConfig else chain.pairs
    lora = {key: 0.1 if key == "lora_dropout" else True}
    with pytest.raises(AlignError, match=key):
        chain.run(chain.config(kind, "refused", rows, lora=lora))
    part = {"lora_target_modules": ["q_proj", "w1" if family == "mixtral" else "gate_proj"]}
    with pytest.raises(AlignError, match="together"):
        chain.run(chain.config(kind, "refused", rows, lora=part))
