"""QLoRA from SFT to merged weights on a CPU, where bitsandbytes can: it crashes below a hidden size of 64."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from align.config.sections import ModelSection
from align.errors import AlignError
from align.models.loading import load_dequantized_policy, load_policy
from align.models.merging import MAX_KL, REPORT, compare, logits_of, merge
from align.runs import run_stage
from align.stages.dpo import DPOConfig
from align.stages.reward import RewardConfig
from align.stages.sft import SFTConfig

WORDS = ["red", "green", "blue", "seven", "north", "under"]
NF4 = {"load_in_4bit": True}
INT8 = {"load_in_8bit": True}

pytestmark = pytest.mark.slow


def why_not(**bits: bool) -> str | None:
    """Why this machine cannot train on so many bits; None where it can."""
    try:
        import bitsandbytes as bnb

        layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compress_statistics=True)
        if "load_in_8bit" in bits:
            layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
        layer.to("cuda" if torch.cuda.is_available() else "cpu")
        device = next(layer.parameters()).device
        x = torch.randn(4, 64, device=device, requires_grad=True)
        layer(x).float().sum().backward()
    except Exception as error:
        return f"bitsandbytes cannot do this here: {type(error).__name__}: {error}"
    return None


@pytest.fixture(scope="module", params=[NF4, INT8], ids=["nf4", "int8"])
def bits(request):
    if reason := why_not(**request.param):
        pytest.skip(reason)
    return request.param


def text(number: int) -> str:
    return " ".join(WORDS[(number * 5 + k * (1 + number % 3)) % len(WORDS)] for k in range(6))


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory) -> Path:
    """A Llama of hidden size 128 that has learned to spell a few words, so that its logits are not flat."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            rope_theta=500000.0,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    rows = [tokenizer(text(n))["input_ids"][:28] for n in range(32)]
    ids = torch.tensor([row for row in rows if len(row) == 28])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss) < 1.0
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("rows")
    chat, pairs = folder / "chat.jsonl", folder / "pairs.jsonl"
    asked = [[{"role": "user", "content": f"say {n}"}] for n in range(24)]
    with chat.open("w") as file:
        for n, prompt in enumerate(asked):
            answer = {"role": "assistant", "content": text(n)}
            file.write(json.dumps({"messages": [*prompt, answer]}) + "\n")
    with pairs.open("w") as file:
        for n, prompt in enumerate(asked):
            sides = {
                side: [{"role": "assistant", "content": content}]
                for side, content in (("chosen", text(n)), ("rejected", text(n + 1)[::-1]))
            }
            file.write(json.dumps({"prompt": prompt, **sides}) + "\n")
    return {"chat": str(chat), "pairs": str(pairs)}


def settings(base: Path, bits: dict, rows: str, output: Path, **more) -> dict:
    trainer = {
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "learning_rate": 2e-3,
        "save_steps": 4,
        "warmup_steps": 0,
        "logging_steps": 1,
    }
    return {
        "output_dir": str(output),
        "model": {"model_name_or_path": str(base), **bits, **more.pop("model", {})},
        "lora": {"lora_r": 8, "lora_alpha": 16},
        "data": {"dataset_name": rows, "test_split_size": 4},
        "trainer": trainer | more.pop("trainer", {}),
        **more,
    }


@pytest.fixture(scope="module")
def runs(base, bits, rows, tmp_path_factory) -> dict[str, Path]:
    """SFT, and DPO that goes on with its adapter."""
    folder = tmp_path_factory.mktemp("runs")
    sft = SFTConfig.model_validate(settings(base, bits, rows["chat"], folder / "sft"))
    first = run_stage(sft, quiet=True)
    adapter = {"adapter_name_or_path": str(first / "artifact"), "adapter_mode": "continue"}
    dpo = DPOConfig.model_validate(
        settings(base, bits, rows["pairs"], folder / "dpo", model=adapter)
    )
    return {"sft": first, "dpo": run_stage(dpo, quiet=True)}


def section(base: Path, bits: dict, run: Path) -> ModelSection:
    return ModelSection(
        model_name_or_path=str(base),
        adapter_name_or_path=str(run / "artifact"),
        adapter_mode="continue",
        **bits,
    )


def test_merged_weights_are_the_trained_model_s(runs, base, bits, tmp_path):
    """SFT, DPO, merge, in nf4: at most 1e-3 nats per token from the model that was trained, on held-out text."""
    # LLM.int8 rounds activations too, which no merged weight can hold: about 1e-3 here, so it takes a consent.
    allowed = MAX_KL if bits == NF4 else 1e-2
    report = merge(str(runs["dpo"]), tmp_path / "merged", max_kl=allowed)
    assert report["merged_into"] == "dequantized"
    assert report["text"]["rows"] == "held out"
    assert 0 <= report["kl_mean"] <= MAX_KL
    assert 0 <= report["trained_quantized"]["kl_mean"] <= allowed
    for found in (report, report["trained_quantized"]):
        assert found["greedy_agreement"] > 0.95
    assert json.loads((tmp_path / "merged" / REPORT).read_text()) == report

    # Again without the code under test's own proof: the bits cost far more than the merge does.
    ids = [[0, *range(40, 70)], [0, *range(80, 120, 2)]]
    trained = logits_of(load_policy(section(base, bits, runs["dpo"])), ids)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    mine = compare(trained, logits_of(merged, ids))["kl_mean"]
    assert mine <= allowed
    if bits == INT8:  # 8 bits cost the weights less than their activations
        return
    original = merge(str(runs["dpo"]), tmp_path / "original", onto="original", max_kl=1e9)
    assert original["merged_into"] == "unquantized"
    assert original["trained_quantized"]["kl_mean"] > 3 * report["trained_quantized"]["kl_mean"]
    before = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), runs["dpo"] / "artifact"
    )
    assert compare(logits_of(before, ids), trained)["kl_mean"] > 3 * mine


def test_dequantizing_needs_no_fresh_load_from_the_caller(runs, base, bits):
    """A forward pass changes how 4 bits are held; the loader's own base has had none."""
    where = section(base, bits, runs["dpo"])
    ids = [[0, *range(40, 70)]]
    trained = logits_of(load_policy(where), ids)
    dequantized = load_dequantized_policy(where)
    assert {p.dtype for p in dequantized.parameters()} == {torch.float32}
    allowed = MAX_KL if bits == NF4 else 1e-2
    assert compare(trained, logits_of(dequantized, ids))["kl_mean"] <= allowed


def test_the_bound_holds_for_the_trained_model_too(runs, tmp_path):
    with pytest.raises(AlignError, match="differs from"):
        merge(str(runs["dpo"]), tmp_path / "merged", max_kl=1e-12)
    assert not (tmp_path / "merged").exists()


def test_nothing_is_upcast_and_the_base_is_never_trained(base, bits):
    """`prepare_model_for_kbit_training` would hold embeddings and head in float32 (2 GB for 8B)."""
    model = load_policy(ModelSection(model_name_or_path=str(base), dtype="bfloat16", **bits))
    assert model.get_input_embeddings().weight.dtype is torch.bfloat16
    assert model.get_output_embeddings().weight.dtype is torch.bfloat16
    packed = [p for p in model.parameters() if not p.is_floating_point()]
    assert len(packed) == 3 * 7
    assert not any(p.requires_grad for p in packed)


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward"])
def test_a_run_goes_on_in_the_same_type_and_ends_as_if_undisturbed(
    runs, base, bits, rows, tmp_path, stage
):
    """Stopped behind the checkpoint of step 4: the same bytes in the end as without a stop."""
    kinds = {"sft": SFTConfig, "dpo": DPOConfig, "reward": RewardConfig}
    data = rows["chat" if stage == "sft" else "pairs"]
    ended = []
    for name in ("whole", "part"):
        given = settings(base, bits, data, tmp_path / name)
        config = kinds[stage].model_validate(given)
        if name == "part":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("align.training.fitting.training_callbacks", dying_callbacks)
                with pytest.raises(RuntimeError, match="dead"):
                    run_stage(config, quiet=True)
        run = run_stage(config, quiet=True)
        ended.append(load_file(run / "artifact" / "adapter_model.safetensors"))
        losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        last = [line["loss"] for line in losses if line.get("step") == 8 and "loss" in line]
        assert last, losses[-3:]
    whole, part = ended
    assert whole.keys() == part.keys()
    assert {weight.dtype for name, weight in whole.items() if "lora" in name} == {torch.bfloat16}
    for name, weight in whole.items():
        assert weight.dtype is part[name].dtype
        assert torch.equal(weight, part[name]), name


def dying_callbacks(folder, trainer):
    """The stage's own, and one that dies in step 6."""
    from transformers import TrainerCallback

    from align.training.callbacks import training_callbacks

    class Dying(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 6:
                raise RuntimeError("dead")

    return [*training_callbacks(folder, trainer), Dying()]
