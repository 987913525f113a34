"""Loss and gradients of our stages equal plain TRL's on the same batch."""

import math
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from align.errors import AlignError
from align.stages.dpo import DPOConfig
from align.stages.reward import RewardConfig
from align.stages.sft import SFTConfig
from align.training.arguments import dpo_arguments, reward_arguments, sft_arguments
from align.training.trainers import DPOTrainer, RewardTrainer, SFTTrainer

CHATS = [
    [
        {"role": "user", "content": "What is 2 plus 3?"},
        {"role": "assistant", "content": "2 plus 3 is 5."},
    ],
    [
        {"role": "user", "content": "Say hi."},
        {"role": "assistant", "content": "Hello, dear reader!"},
    ],
]
PAIRS = [
    {"prompt": chat[:1], "chosen": chat[1:], "rejected": [{"role": "assistant", "content": text}]}
    for chat, text in zip(CHATS, ["No.", "Go away, and do not come back."], strict=True)
]


def perturb(model: torch.nn.Module, seed: int = 1) -> None:
    """Move every trained weight off its start, so that no gradient is zero by construction."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def first_gradients(trainer) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first batch in file order, without an update."""
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    grads = {
        name: parameter.grad.clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.grad is not None
    }
    trainer.model.zero_grad()
    return float(loss), grads


def assert_same(ours, theirs) -> None:
    (loss, grads), (their_loss, their_grads) = first_gradients(ours), first_gradients(theirs)
    assert loss == pytest.approx(their_loss, rel=1e-5)
    assert grads.keys() == their_grads.keys()
    assert len(grads) > 4
    for name, grad in grads.items():
        scale = their_grads[name].abs().max()
        assert scale > 0, name
        assert (grad - their_grads[name]).abs().max() <= 1e-5 * scale, name


def trl_arguments(kind, folder: Path, **more):
    common = {"report_to": [], "bf16": False, "use_cpu": True, "gradient_checkpointing": False}
    return kind(output_dir=str(folder), remove_unused_columns=False, **common, **more)


def config_of(kind, llama: Path, rows: Path, **more):
    return kind.model_validate(
        {
            "output_dir": "unused",
            "model": {"model_name_or_path": str(llama)},
            "data": {"dataset_name": str(rows), "max_length": None},
            "trainer": {"gradient_checkpointing": False},
            **more,
        }
    )


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "messages.jsonl"
    Dataset.from_list([{"messages": chat} for chat in CHATS]).to_json(path)
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    Dataset.from_list(PAIRS).to_json(path)
    return path


def lora(task: TaskType) -> LoraConfig:
    saved = ["score"] if task is TaskType.SEQ_CLS else None
    return LoraConfig(r=4, target_modules="all-linear", task_type=task, modules_to_save=saved)


def policy(llama: Path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    model = get_peft_model(model, lora(TaskType.CAUSAL_LM))
    perturb(model)
    return model


def test_sft_equals_trl_on_the_same_messages(llama, rows, tokenizer, tmp_path):
    from align.data.rendering import training_rows

    config = config_of(SFTConfig, llama, rows)
    ours = SFTTrainer(
        model=policy(llama),
        args=sft_arguments(config, tmp_path),
        train_dataset=training_rows(config.data, tokenizer, "sft").train,
        processing_class=tokenizer,
    )
    theirs = trl.SFTTrainer(
        model=policy(llama),
        args=trl_arguments(trl.SFTConfig, tmp_path, assistant_only_loss=True, max_length=None),
        train_dataset=Dataset.from_list([{"messages": chat} for chat in CHATS]),
        processing_class=tokenizer,
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize("padding_free", [True, False])
def test_reward_equals_trl_on_the_same_pairs(llama, pairs, tokenizer, tmp_path, padding_free):
    from align.data.rendering import training_rows

    def model():
        torch.manual_seed(0)
        base = AutoModelForSequenceClassification.from_pretrained(
            llama, num_labels=1, dtype=torch.float32
        )
        wrapped = get_peft_model(base, lora(TaskType.SEQ_CLS))
        perturb(wrapped)
        return wrapped

    config = config_of(RewardConfig, llama, pairs, center_rewards_coefficient=0.01)
    rendered = training_rows(config.data, tokenizer, "reward").train
    ours = RewardTrainer(
        model=model(),
        args=reward_arguments(config, tmp_path),
        train_dataset=rendered.select_columns(["chosen_ids", "rejected_ids"]),
        processing_class=tokenizer,
        padding_free=padding_free,
    )
    theirs = trl.RewardTrainer(
        model=model(),
        args=trl_arguments(
            trl.RewardConfig, tmp_path, center_rewards_coefficient=0.01, max_length=None
        ),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )
    assert_same(ours, theirs)
    assert ours.shares_prompts is padding_free


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge", "robust", "apo_zero"])
def test_dpo_equals_trl_on_the_same_pairs(
    llama, pairs, tokenizer, tmp_path, loss_type, padding_free
):
    from align.data.rendering import training_rows

    # The hinge of far-apart sequences is flat; a small beta keeps every loss off its corners.
    more = {"beta": 0.01, "loss_type": loss_type}
    config = config_of(DPOConfig, llama, pairs, **more)

    def base():
        return AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)

    ours = DPOTrainer(
        model=base(),
        args=dpo_arguments(config, tmp_path),
        train_dataset=training_rows(config.data, tokenizer, "dpo").train,
        processing_class=tokenizer,
        padding_free=padding_free,
        peft_config=lora(TaskType.CAUSAL_LM),
    )
    theirs = trl.DPOTrainer(
        model=base(),
        args=trl_arguments(
            trl.DPOConfig, tmp_path, max_length=None, **{**more, "loss_type": [loss_type]}
        ),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
        peft_config=lora(TaskType.CAUSAL_LM),
    )
    for trainer in (ours, theirs):
        perturb(trainer.model)
    ours.reference_checked = True  # the policy was moved off the reference on purpose
    assert_same(ours, theirs)
    assert ours.shares_prompts is padding_free


def dpo_trainer(llama, pairs, tokenizer, tmp_path, model=None, **more) -> DPOTrainer:
    from align.data.rendering import training_rows

    config = config_of(DPOConfig, llama, pairs, **more)
    return DPOTrainer(
        model=model or AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32),
        args=dpo_arguments(config, tmp_path),
        train_dataset=training_rows(
            config.data, tokenizer, "dpo", mask_format=config.mask_format_tokens
        ).train,
        processing_class=tokenizer,
        peft_config=lora(TaskType.CAUSAL_LM),
    )


def test_dpo_starts_at_ln_2(llama, pairs, tokenizer, tmp_path):
    trainer = dpo_trainer(llama, pairs, tokenizer, tmp_path)
    loss, _ = first_gradients(trainer)
    assert loss == pytest.approx(0.693147, abs=1e-5)
    assert trainer.reference_checked


def test_dpo_refuses_a_policy_that_is_not_its_reference(llama, pairs, tokenizer, tmp_path):
    trainer = dpo_trainer(llama, pairs, tokenizer, tmp_path)
    perturb(trainer.model)
    with pytest.raises(AlignError, match="policy and reference differ"):
        first_gradients(trainer)


# --- Llama 3's additions to DPO ---------------------------------------------------------------

BETA, ALPHA = 0.1, 0.2


def log_probabilities(model, ids: list[int]) -> torch.Tensor:
    """log p of every token but the first, one by one."""
    tokens = torch.tensor([ids])
    logs = torch.log_softmax(model(input_ids=tokens).logits[0, :-1], dim=-1)
    return logs.gather(1, tokens[0, 1:, None])[:, 0]


def by_hand(trainer, *, masked: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of DPO with NLL at its start, worked out on paper.

    Policy and reference agree, so every margin is 0: the sigmoid loss is ln 2, and its derivative by
    the log-probability of an answer is -beta / 2 for the chosen and +beta / 2 for the rejected, over
    the number of pairs. The NLL term adds -alpha / N for each of the N chosen tokens.
    """
    model, rows = trainer.model, [trainer.train_dataset[i] for i in range(2)]
    end = trainer.processing_class.convert_tokens_to_ids("<|eot_id|>")
    kept = {
        side: [[not (masked and token == end) for token in row[f"{side}_ids"]] for row in rows]
        for side in ("chosen", "rejected")
    }
    count = sum(map(sum, kept["chosen"]))
    weighted, nll = torch.zeros(()), 0.0
    for number, row in enumerate(rows):
        for side, sign in (("chosen", -1), ("rejected", 1)):
            logs = log_probabilities(model, row["prompt_ids"] + row[f"{side}_ids"])
            logs = logs[len(row["prompt_ids"]) - 1 :][torch.tensor(kept[side][number])]
            weight = sign * BETA / 2 / len(rows) - (ALPHA / count if side == "chosen" else 0)
            weighted = weighted + weight * logs.sum()
            nll -= float(logs.sum()) / count if side == "chosen" else 0
    weighted.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return math.log(2) + ALPHA * nll, grads


@pytest.mark.parametrize("masked", [False, True])
def test_dpo_with_nll_and_format_mask_is_what_paper_and_pencil_give(
    llama, pairs, tokenizer, tmp_path, masked
):
    trainer = dpo_trainer(
        *(llama, pairs, tokenizer, tmp_path),
        rpo_alpha=ALPHA,
        beta=BETA,
        mask_format_tokens=masked,
    )
    loss, grads = first_gradients(trainer)
    expected, by_pencil = by_hand(trainer, masked=masked)
    assert loss == pytest.approx(expected, rel=1e-5)
    trained = {name for name, grad in grads.items() if grad.abs().max() > 0}
    assert len(trained) > 4
    for name in trained:
        scale = by_pencil[name].abs().max()
        assert (grads[name] - by_pencil[name]).abs().max() <= 1e-4 * scale, name


def test_the_nll_term_is_trls_own_loss(llama, pairs, tokenizer, tmp_path):
    short = dpo_trainer(llama, pairs, tokenizer, tmp_path, rpo_alpha=0.2)
    long = dpo_trainer(
        *(llama, pairs, tokenizer, tmp_path),
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, 0.2],
    )
    for trainer in (short, long):
        perturb(trainer.model)
        trainer.reference_checked = True
    assert_same(short, long)


def test_a_masked_end_token_gets_no_gradient(llama, tokenizer, tmp_path):
    """Two answers that differ in their end token alone: nothing to learn once it is masked."""
    from datasets import Dataset as Rows

    end, other = (tokenizer.convert_tokens_to_ids(t) for t in ("<|eot_id|>", "<|end_of_text|>"))
    row = {"prompt_ids": [0, 50], "chosen_ids": [60, 61, end], "rejected_ids": [60, 61, other]}
    masks = {"chosen_mask": [1, 1, 0], "rejected_mask": [1, 1, 0]}
    gradients = []
    for more in ({}, masks):
        config = config_of(DPOConfig, llama, tmp_path / "none.jsonl")
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32),
            args=dpo_arguments(config, tmp_path),
            train_dataset=Rows.from_list([{**row, **more}] * 2),
            processing_class=tokenizer,
            peft_config=lora(TaskType.CAUSAL_LM),
        )
        _, grads = first_gradients(trainer)
        gradients.append(max(float(grad.abs().max()) for grad in grads.values()))
    assert gradients[0] > 1e-4
    assert gradients[1] < 1e-4 * gradients[0]  # the rest is rounding


def test_the_mask_reaches_the_trainers_own_batches(llama, pairs, tokenizer, tmp_path):
    """The columns survive the Trainer's removal of unused ones, in training and precomputing."""
    trainer = dpo_trainer(
        *(llama, pairs, tokenizer, tmp_path), mask_format_tokens=True, precompute_ref_log_probs=True
    )
    batch = next(iter(trainer.get_train_dataloader()))
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert int(batch["completion_mask"][batch["input_ids"] == end].sum()) == 0
    assert int(batch["completion_mask"].sum()) > 0
