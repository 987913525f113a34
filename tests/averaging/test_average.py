"""Averages: equal to the mean of the weights they stand for, refused where there is no such mean."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from align.averaging.factors import cut_to
from align.config.load import load_pipeline, load_stage
from align.config.sections import LoraSection
from align.durable import read_json
from align.errors import AlignError
from align.generation.scoring import RewardScorer
from align.models.adapters import lora_config, save_adapter
from align.models.identity import write_base_identity
from align.models.loading import load_any_policy, load_reward_model
from align.runs import run_stage
from align.stages.average import AverageConfig
from align.stages.reward import RewardConfig
from align.stages.sft import SFTConfig

IDS = torch.tensor([[0, 2, 40, 50, 60, 70, 4]])


def base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def adapter(
    llama: Path, folder: Path, seed: int, tokenizer: Any, *, reward: bool = False, **section: Any
) -> str:
    """An adapter with random factors, saved as a stage saves it."""
    torch.manual_seed(seed)
    kind = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    more = {"num_labels": 1} if reward else {}
    model = kind.from_pretrained(llama, dtype=torch.float32, **more)
    config = lora_config(LoraSection(**section), reward=reward, tokenizer=tokenizer, model=model)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save_adapter(adapted, folder, base=str(llama), revision="main")
    write_base_identity(folder, str(llama), adapted.config.to_dict())
    tokenizer.save_pretrained(folder)
    return str(folder)


def average(output: Path, **given: Any) -> Path:
    config = AverageConfig.model_validate({"output_dir": str(output), **given})
    return run_stage(config, quiet=True) / "artifact"


def report(artifact: Path) -> dict[str, Any]:
    found = read_json(artifact / "average_report.json")
    assert isinstance(found, dict)
    return found


def merged(llama: Path, folder: str) -> dict[str, torch.Tensor]:
    return PeftModel.from_pretrained(base(llama), folder).merge_and_unload().state_dict()


def mean_logits(llama: Path, folders: list[str], weights: list[float]) -> torch.Tensor:
    """What the mean of the merged weights answers, computed the long way."""
    states = [merged(llama, folder) for folder in folders]
    mean = {
        name: sum(
            weight * state[name].double() for weight, state in zip(weights, states, strict=True)
        )
        for name in states[0]
    }
    model = base(llama)
    model.load_state_dict({name: tensor.float() for name, tensor in mean.items()})
    with torch.no_grad():
        return model(IDS).logits


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_any_policy(str(folder))[0].float()(IDS).logits


SECTIONS = [{"lora_r": 4}, {"lora_r": 6, "lora_alpha": 8, "use_rslora": True}]


@pytest.fixture
def two(llama, tokenizer, tmp_path) -> dict[str, str]:
    """Adapters of different rank and scale, with trained token rows."""
    return {
        name: adapter(
            llama, tmp_path / name, seed, tokenizer, trainable_token_indices="control", **section
        )
        for seed, (name, section) in enumerate(zip("ab", SECTIONS, strict=True))
    }


@pytest.mark.parametrize("method", ["cat", "merge"])
def test_an_exact_average_is_the_mean_of_the_merged_weights(llama, two, tmp_path, method):
    found = average(tmp_path / "mean", models=two, weights={"a": 3}, method=method)
    expected = mean_logits(llama, list(two.values()), [0.75, 0.25])
    torch.testing.assert_close(logits(found), expected, rtol=1e-4, atol=1e-4)
    if method == "cat":
        assert json.loads((found / "adapter_config.json").read_text())["r"] == 10
        assert (found / "base_identity.json").is_file()
    assert (found / "config.json").is_file() == (method == "merge")
    assert not list(found.glob("*.bin"))


def test_the_mean_of_the_factors_is_another_model(llama, two, tokenizer, tmp_path):
    """Why there is no such method: the same rank and scale, and far from the mean of the deltas."""
    both = {
        name: adapter(llama, tmp_path / f"{name}2", seed, tokenizer)
        for seed, name in enumerate("ab")
    }
    tensors = [load_file(Path(path) / "adapter_model.safetensors") for path in both.values()]
    wrong = tmp_path / "wrong"
    shutil.copytree(both["a"], wrong)
    mean = {name: (tensor + tensors[1][name]) / 2 for name, tensor in tensors[0].items()}
    save_file(mean, wrong / "adapter_model.safetensors")
    right = logits(average(tmp_path / "right", models=both))
    expected = mean_logits(llama, list(both.values()), [0.5, 0.5])
    torch.testing.assert_close(right, expected, rtol=1e-4, atol=1e-4)
    assert (logits(wrong) - expected).abs().max() > 0.1


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_peft_gives_the_same(llama, tokenizer, tmp_path, method):
    both = {
        name: adapter(llama, tmp_path / name, seed, tokenizer, lora_r=4 + 2 * seed)
        for seed, name in enumerate("ab")
    }
    model = PeftModel.from_pretrained(base(llama), both["a"], adapter_name="a")
    model.load_adapter(both["b"], adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean", combination_type=method)
    model.set_adapter("mean")
    with torch.no_grad():
        expected = model(IDS).logits
    found = average(tmp_path / "mean", models=both, method=method)
    torch.testing.assert_close(logits(found), expected, rtol=1e-3, atol=1e-3)
    assert (
        json.loads((found / "adapter_config.json").read_text())["r"]
        == {"cat": 10, "svd": 6}[method]
    )


def test_the_error_of_a_cut_is_the_true_one(llama, two, tmp_path):
    found = average(tmp_path / "cut", models=two, method="svd", svd_rank=3)
    exact = average(tmp_path / "exact", models=two)
    said = report(found)

    def deltas(folder: Path) -> dict[str, torch.Tensor]:
        plain = merged(llama, str(folder))
        return {k: v - base_state[k] for k, v in plain.items() if "_proj" in k}

    base_state = base(llama).state_dict()
    true, cut = deltas(exact), deltas(found)
    left = sum(float((true[key] - cut[key]).double().square().sum()) for key in true)
    whole = sum(float(true[key].double().square().sum()) for key in true)
    assert said["svd_error"] == pytest.approx((left / whole) ** 0.5, rel=1e-3)
    worst = max(float((true[key] - cut[key]).norm() / true[key].norm()) for key in true)
    assert said["worst_module"]["error"] == pytest.approx(worst, rel=1e-3)
    assert 0.1 < said["svd_error"] < worst < 1
    full = report(average(tmp_path / "full", models=two, method="svd", svd_rank=10))
    assert full["svd_error"] < 1e-6


def test_a_cut_is_the_best_of_its_rank():
    torch.manual_seed(0)
    a, b = torch.randn(6, 20).double(), torch.randn(15, 6).double()
    new_a, new_b, kept, cut = cut_to(a, b, 2)
    u, s, v = torch.linalg.svd(b @ a)
    torch.testing.assert_close(new_b @ new_a, u[:, :2] @ torch.diag(s[:2]) @ v[:2])
    assert kept == pytest.approx(float(s[:2].square().sum()))
    assert cut == pytest.approx(float(s[2:6].square().sum()))
    narrow = cut_to(torch.randn(6, 3).double(), torch.randn(15, 6).double(), 5)
    assert narrow[0].shape == (5, 3)
    assert narrow[1].shape == (15, 5)


def test_distances_are_those_of_the_deltas(llama, two, tmp_path):
    said = report(average(tmp_path / "mean", models=two))
    state = base(llama).state_dict()
    flat = [
        torch.cat([(plain[k] - state[k]).flatten().double() for k in plain if "_proj" in k])
        for plain in (merged(llama, path) for path in two.values())
    ]
    mean = sum(flat) / 2
    for name, one in zip("ab", flat, strict=True):
        assert said["distances"][name] == pytest.approx(
            float((one - mean).norm() / mean.norm()), rel=1e-3
        )
    cosine = torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0)
    assert said["cosines"]["a, b"] == pytest.approx(float(cosine), abs=1e-4)
    assert said["members"] == {"a": 0.5, "b": 0.5}


def test_dora_is_averaged_as_full_weights_only(llama, tokenizer, tmp_path):
    both = {
        name: adapter(llama, tmp_path / name, seed, tokenizer, use_dora=True)
        for seed, name in enumerate("ab")
    }
    with pytest.raises(AlignError, match=r"`use_dora`[\s\S]*method: merge"):
        average(tmp_path / "mean", models=both)
    assert not (tmp_path / "mean").exists()
    assert not (tmp_path / "mean.partial").exists()
    found = average(tmp_path / "mean", models=both, method="merge")
    expected = mean_logits(llama, list(both.values()), [0.5, 0.5])
    torch.testing.assert_close(logits(found), expected, rtol=1e-4, atol=1e-4)
    assert "distance" not in report(found)


@pytest.mark.parametrize("method", ["cat", "merge"])
def test_reward_models_are_averaged_with_their_heads(llama, tokenizer, tmp_path, method):
    both = {
        name: adapter(llama, tmp_path / name, seed, tokenizer, reward=True)
        for seed, name in enumerate("ab")
    }
    found = average(tmp_path / "mean", models=both, method=method)
    states = []
    for path in both.values():
        model = load_reward_model(path)[0]
        states.append(model.merge_and_unload().state_dict())
        kept = model.config
    plain = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    plain.config.pad_token_id = kept.pad_token_id
    plain.load_state_dict({k: (states[0][k] + states[1][k]) / 2 for k in states[0]})
    expected = RewardScorer(plain, tokenizer).score(IDS.tolist(), batch_size=1)
    loaded = RewardScorer(*load_reward_model(str(found))).score(IDS.tolist(), batch_size=1)
    assert loaded == pytest.approx(expected, abs=1e-4)


# --- full models ------------------------------------------------------------------------------


@pytest.fixture
def near(llama, tokenizer, tmp_path) -> dict[str, str]:
    """Two full models close to one base; the second one in several files."""
    found = {}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = base(llama)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        model.save_pretrained(tmp_path / name, max_shard_size="60KB" if seed else "5GB")
        tokenizer.save_pretrained(tmp_path / name)
        found[name] = str(tmp_path / name)
    return found


@pytest.mark.parametrize("turned", [False, True])
def test_full_models_are_averaged_whatever_their_files(near, tmp_path, turned):
    models = dict(reversed(near.items())) if turned else near
    found = average(tmp_path / "mean", models=models, weights={"a": 2})
    a, b = (base(Path(path)).state_dict() for path in near.values())
    mean = base(found).state_dict()
    for key, tensor in mean.items():
        torch.testing.assert_close(tensor, (2 * a[key] + b[key]) / 3)
    assert (len(list(found.glob("*.safetensors"))) > 1) == turned
    distances = report(found)["distances"]
    assert 0 < distances["a"] < distances["b"] == pytest.approx(2 * distances["a"], rel=1e-3)
    half = average(tmp_path / "half", models=models, dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(half).dtype is torch.bfloat16
    assert AutoTokenizer.from_pretrained(half).chat_template


def test_models_without_a_common_base_are_refused(llama, make_llama, tmp_path):
    with pytest.raises(AlignError, match="no base in common"):
        average(tmp_path / "mean", models={"a": str(llama), "b": str(make_llama(7))})
    assert not (tmp_path / "mean").exists()
    average(tmp_path / "mean", models={"a": str(llama), "b": str(make_llama(7))}, max_distance=2)


def test_what_does_not_belong_together_is_refused(llama, make_llama, two, tokenizer, tmp_path):
    def refused(words: str, **models: str) -> None:
        with pytest.raises(AlignError, match=words):
            average(tmp_path / "mean", models=models)

    refused("an adapter, and that is a full model", a=str(llama), b=two["a"])
    refused("num_hidden_layers is 3", a=str(llama), b=str(make_llama(0, layers=3)))
    other = make_llama(5)
    foreign = adapter(other, tmp_path / "foreign", 1, tokenizer, trainable_token_indices="control")
    refused("its base is", a=two["a"], b=foreign)
    few = adapter(llama, tmp_path / "few", 1, tokenizer, lora_target_modules=["q_proj"])
    refused("`target_modules` is", a=few, b=adapter(llama, tmp_path / "all", 2, tokenizer))
    turned = tmp_path / "turned"
    shutil.copytree(two["b"], turned)
    config = json.loads((turned / "adapter_config.json").read_text())
    config["trainable_token_indices"] = config["trainable_token_indices"][::-1]
    (turned / "adapter_config.json").write_text(json.dumps(config))
    refused("`trainable_token_indices` is", a=two["a"], b=str(turned))
    told = tmp_path / "told"
    shutil.copytree(two["b"], told)
    changed = AutoTokenizer.from_pretrained(told)
    changed.chat_template += " "
    changed.save_pretrained(told)
    refused("another chat template", a=two["a"], b=str(told))
    grown = AutoTokenizer.from_pretrained(two["b"])
    grown.add_tokens(["<new>"])
    grown.save_pretrained(told)
    refused("another vocabulary", a=two["a"], b=str(told))
    pickled = tmp_path / "pickled"
    shutil.copytree(llama, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    refused("align reads no pickle files", a=str(llama), b=str(pickled))
    broken = tmp_path / "broken"
    shutil.copytree(two["b"], broken)
    (broken / "adapter_model.safetensors").write_bytes(b"half")
    refused("cannot be read as safetensors", a=two["a"], b=str(broken))
    for path in (two["b"], str(llama)):
        folder = tmp_path / f"nan-{Path(path).name}"
        shutil.copytree(path, folder)
        file = next(folder.glob("*.safetensors"))
        tensors = load_file(file)
        tensors[min(tensors)].view(-1)[0] = float("nan")
        save_file(tensors, file, metadata={"format": "pt"})
        refused("holds NaN or infinity", a=path, b=str(folder))
    with pytest.raises(AlignError, match="above 10, the rank of the exact average"):
        average(tmp_path / "mean", models=two, method="svd", svd_rank=11)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("models: {a: org/a}", "an average takes two"),
        ("models: {a: org/a, b: org/b}\nsvd_rank: 4", "`svd_rank` is the rank of `svd`"),
        ("models: {a: org/a, b: org/b}\nweights: {c: 1}", "names no entry of `models`: `c`"),
        ("models: {a: org/a, b: org/b}\nmethod: linear", "one of `cat`, `svd`, `merge`"),
        ("models: {a: org/a, b: org/b}\nweights: {a: 0}", "weights"),
        ("models: {a: org/a}\ncheckpoints: 1", "take two or more"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(tmp_path, monkeypatch, given, words):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(f"stage: average\noutput_dir: runs/x\n{given}\n")
    with pytest.raises(AlignError) as caught:
        load_stage("r.yaml")
    assert words in str(caught.value)


# --- checkpoints of one run -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("use_peft", [True, False], ids=["adapter", "full"])
def test_the_last_checkpoints_of_a_run_are_averaged(llama, tmp_path, use_peft):
    rows = tmp_path / "rows.jsonl"
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}]
    rows.write_text((json.dumps({"messages": chat}) + "\n") * 8)
    given = {
        "model": {"model_name_or_path": str(llama)},
        "lora": {"use_peft": use_peft, "lora_r": 4},
        "data": {"dataset_name": str(rows)},
        "trainer": {
            **{
                "max_steps": 6,
                "save_steps": 2,
                "per_device_train_batch_size": 2,
                "learning_rate": 1e-2,
            },
            **{
                "keep_checkpoints": 2,
                "gradient_checkpointing": False,
                "lr_scheduler_type": "constant",
            },
        },
    }
    run = run_stage(
        SFTConfig.model_validate({"output_dir": str(tmp_path / "sft"), **given}), quiet=True
    )
    assert sorted(path.name for path in (run / "kept").iterdir()) == [
        "checkpoint-4",
        "checkpoint-6",
    ]
    files = {path.name for path in (run / "kept" / "checkpoint-4").iterdir()}
    assert not any("optimizer" in name or name.endswith((".bin", ".pth", ".pt")) for name in files)
    found = average(tmp_path / "mean", models={"sft": str(run / "artifact")}, checkpoints=2)
    assert set(report(found)["members"]) == {"sft/checkpoint-4", "sft/checkpoint-6"}
    kept = [str(run / "kept" / f"checkpoint-{step}") for step in (4, 6)]
    if use_peft:
        expected = mean_logits(llama, kept, [0.5, 0.5])
    else:
        a, b = (base(Path(path)).state_dict() for path in kept)
        model = base(llama)
        model.load_state_dict({key: (a[key] + b[key]) / 2 for key in a})
        with torch.no_grad():
            expected = model(IDS).logits
    torch.testing.assert_close(logits(found), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, logits(run / "artifact"), atol=1e-3)
    with pytest.raises(AlignError, match=r"keeps 2 checkpoints, and 3 are asked for"):
        average(tmp_path / "more", models={"sft": str(run / "artifact")}, checkpoints=3)
    for weights in (run / "kept" / "checkpoint-4").glob("*.safetensors"):
        shutil.copyfile(run / "kept" / "checkpoint-6" / weights.name, weights)
    with pytest.raises(AlignError, match="other content"):  # what was averaged is no longer there
        average(tmp_path / "mean", models={"sft": str(run / "artifact")}, checkpoints=2)


@pytest.mark.slow
def test_the_last_checkpoints_of_a_reward_model_are_averaged(llama, tmp_path):
    rows = tmp_path / "pairs.jsonl"
    pair = {"prompt": "Name one.", "chosen": "It is one.", "rejected": "No."}
    rows.write_text((json.dumps(pair) + "\n") * 8)
    given = {
        "model": {"model_name_or_path": str(llama)},
        "data": {"dataset_name": str(rows)},
        "trainer": {
            **{"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2},
            **{"keep_checkpoints": 2, "gradient_checkpointing": False, "learning_rate": 1e-2},
        },
    }
    output = {"output_dir": str(tmp_path / "reward")}
    run = run_stage(RewardConfig.model_validate(output | given), quiet=True)
    found = average(tmp_path / "mean", models={"r": str(run / "artifact")}, checkpoints=2)
    heads = [
        load_file(run / "kept" / f"checkpoint-{step}" / "adapter_model.safetensors")
        for step in (2, 4)
    ]
    mean = load_file(found / "adapter_model.safetensors")
    (name,) = [key for key in mean if "score" in key]
    torch.testing.assert_close(mean[name], (heads[0][name] + heads[1][name]) / 2)
    assert len(RewardScorer(*load_reward_model(str(found))).score(IDS.tolist(), batch_size=1)) == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("save_total_limit: 1", "more than the 1 checkpoints"),
        ("learning_rate: 1e-3", None),
    ],
)
def test_kept_checkpoints_have_to_be_there(tmp_path, monkeypatch, given, words):
    monkeypatch.chdir(tmp_path)
    text = "stage: sft\noutput_dir: o\nmodel: {model_name_or_path: org/b}\ndata: {dataset_name: org/r}\n"
    Path("r.yaml").write_text(text + f"trainer:\n  keep_checkpoints: 2\n  {given}\n")
    if words is None:
        load_stage("r.yaml")
        return
    with pytest.raises(AlignError) as caught:
        load_stage("r.yaml")
    assert words in str(caught.value)


def test_adapters_of_a_quantized_base_are_not_merged_into_another_one(two, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(two["a"], run / "artifact")
    (run / "recipe.yaml").write_text("{stage: sft, model: {load_in_4bit: true}}")
    models = {"a": str(run / "artifact"), "b": two["b"]}
    with pytest.raises(AlignError, match="was trained on a quantized base"):
        average(tmp_path / "mean", models=models, method="merge")
    assert average(tmp_path / "mean", models=models, method="cat").is_dir()


def test_averages_of_each_other_are_refused(tmp_path, monkeypatch):
    """Not with an endless search for what they are made of."""
    monkeypatch.chdir(tmp_path)
    stages = {
        name: {"stage": "average", "models": {"x": f"${other}", "y": "org/model"}}
        for name, other in (("one", "two"), ("two", "one"))
    }
    Path("p.yaml").write_text(json.dumps({"output_dir": "runs", "stages": stages}))
    with pytest.raises(AlignError) as caught:
        load_pipeline("p.yaml")
    assert [problem.message for problem in caught.value.problems] == [
        "`one.models.x` refers to the later stage `two`"
    ]
