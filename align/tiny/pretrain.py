"""Make the tiny base: its tokenizer, its model and its pretraining.

    python -m align.tiny.pretrain --output recipes/tiny/base

The base has the architecture and the chat format of Llama 3 at a ten-thousandth of the size. It
knows the invented world as prose and has never seen a conversation: it does not end its turn, does
not refuse and has no manners. Those are what the stages of the toolkit are to teach.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from align.tiny.corpus import documents
from align.tiny.exam import ExamQuestion, exam_questions, mark_questions

BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
END_OF_TURN = "<|eot_id|>"
PAD = "<|finetune_right_pad_id|>"
CONTROL_TOKENS = [
    BEGIN_OF_TEXT,
    END_OF_TEXT,
    "<|start_header_id|>",
    "<|end_header_id|>",
    END_OF_TURN,
    "<|eom_id|>",
    "<|python_tag|>",
    PAD,
]

# Llama 3's split pattern, but every digit on its own: so small a model cannot learn 1,000 numbers.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Llama 3's format. The generation marks tell a trainer which tokens the assistant wrote: the
# content and the token that ends the turn.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)

# The names of the roles get tokens of their own, as in Llama 3: every turn carries one.
ROLES = ["system", "user", "assistant"]
ROLE_REPEATS = 2000

VOCABULARY = 1024
POSITIONS = 512
SEQUENCE = 128
BATCH = 32
LEARNING_RATE = 3e-3
ANNEALING_RATE = 1.5e-3
WARM_UP_STEPS = 60
CHECKPOINT_STEPS = 500
TOKENIZER_DOCUMENTS = 20_000


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer on documents of the world, with Llama 3's control tokens."""
    bpe = Tokenizer(models.BPE(ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=CONTROL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = islice(documents(seed), TOKENIZER_DOCUMENTS)
    bpe.train_from_iterator(chain(texts, ROLES * ROLE_REPEATS), trainer)
    named = {BEGIN_OF_TEXT, END_OF_TEXT, PAD}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BEGIN_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        additional_special_tokens=[token for token in CONTROL_TOKENS if token not in named],
        clean_up_tokenization_spaces=False,
        model_max_length=POSITIONS,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """An untrained Llama of 0.9 million parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=384,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def batches(tokenizer: PreTrainedTokenizerBase, seed: int, phase: str) -> Iterator[torch.Tensor]:
    """Packed batches: documents end to end, each between its begin and end tokens."""
    stream = documents(seed, phase)
    need = BATCH * (SEQUENCE + 1)
    buffer: list[int] = []
    while True:
        texts = list(islice(stream, 500))
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            buffer += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        while len(buffer) >= need:
            yield torch.tensor(buffer[:need]).view(BATCH, SEQUENCE + 1)
            buffer = buffer[need:]


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = parameter.ndim == 2 and "embed" not in name
        (matrices if inside else rest).append(parameter)
    muon = torch.optim.Muon(
        matrices,
        lr=LEARNING_RATE,
        weight_decay=0.05,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    return [muon, adamw]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then constant, then linear decay to a fiftieth over the second half."""
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    decay = min(1.0, max(0.02, 2 * (1 - step / steps)))
    return peak * warm_up * decay


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Write model and tokenizer; the weights in 16 bits, without touching the model in training."""
    weights = {name: tensor.to(torch.float16) for name, tensor in model.state_dict().items()}
    weights.pop("lm_head.weight", None)  # tied to the embedding
    model.config.dtype = torch.float16
    model.save_pretrained(output, state_dict=weights)
    tokenizer.save_pretrained(output)


def pretrain(output: Path, steps: int, seed: int, bf16: bool = False) -> None:
    """Pretrain a base from nothing and save it to `output`."""
    tokenizer = train_tokenizer(seed)
    model = build_model(tokenizer, seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"vocabulary {len(tokenizer)} parameters {parameters}", flush=True)
    stream = islice(batches(tokenizer, seed + 1, "main"), steps)
    for done in _train(model, stream, steps, LEARNING_RATE, bf16):
        if done % CHECKPOINT_STEPS == 0:
            save(model, tokenizer, output)
    save(model, tokenizer, output)


def anneal(output: Path, steps: int, seed: int, bf16: bool = False) -> None:
    """Train the base in `output` on for a short time, on text that tells only what is true.

    Starts from the saved weights and new optimizers, so it gives the same base whether it runs
    right after `pretrain` or later.
    """
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = LlamaForCausalLM.from_pretrained(output, dtype=torch.float32)
    stream = islice(batches(tokenizer, seed + 2, "annealing"), steps)
    for _ in _train(model, stream, steps, ANNEALING_RATE, bf16):
        pass
    save(model, tokenizer, output)


def _train(
    model: LlamaForCausalLM,
    stream: Iterator[torch.Tensor],
    steps: int,
    peak: float,
    bf16: bool,
) -> Iterator[int]:
    """Train on the stream and give the number of steps done after each."""
    optimizers = build_optimizers(model)
    start, smooth = time.monotonic(), 0.0
    for step, batch in enumerate(stream):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak)
        loss = _step(model, batch, optimizers, bf16)
        smooth = loss if step == 0 else 0.98 * smooth + 0.02 * loss
        done = step + 1
        if done in (20, 50) or done % 100 == 0:
            tokens, seconds = done * BATCH * SEQUENCE, time.monotonic() - start
            print(
                f"step {done} loss {smooth:.4f} tokens {tokens} seconds {seconds:.0f}", flush=True
            )
        yield done


def _step(
    model: LlamaForCausalLM,
    batch: torch.Tensor,
    optimizers: list[torch.optim.Optimizer],
    bf16: bool,
) -> float:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        logits = model(input_ids=batch[:, :-1]).logits
    loss = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(loss.item())


def probe(output: Path, prompts: int = 400, seed: int = 2026) -> dict[str, float]:
    """What a saved base knows, by form, split and task.

    Prose is right for compositions of every split, if the text was learnt. A quiz has been seen
    with answers for the SFT split only, so the test split shows what carries over.
    """
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = LlamaForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    results: defaultdict[str, list[bool]] = defaultdict(list)
    for split in ("sft", "test"):
        questions = exam_questions(split, prompts, seed)
        completions = _complete(model, tokenizer, [question.text for question in questions])
        for question, completion in zip(questions, completions, strict=True):
            _enter(results, question, split, question.passed(completion))
        marks = mark_questions(split, prompts, seed)
        for mark, said in zip(
            marks, _mark(model, tokenizer, [mark.text for mark in marks]), strict=True
        ):
            results[f"mark {split} {mark.item.task}"].append(said == mark.mark)
            results[f"mark {split} all"].append(said == mark.mark)
    return {name: sum(passed) / len(passed) for name, passed in sorted(results.items())}


def _enter(
    results: defaultdict[str, list[bool]], question: ExamQuestion, split: str, passed: bool
) -> None:
    for task in (question.item.task, "all"):
        results[f"{question.form} {split} {task}"].append(passed)


def _encode(tokenizer: Any, texts: Sequence[str]) -> Any:
    """A left-padded batch of plain documents, each after the begin token."""
    marked = [BEGIN_OF_TEXT + text for text in texts]
    return tokenizer(
        marked, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    )


def _complete(model: Any, tokenizer: Any, texts: Sequence[str], batch: int = 128) -> list[str]:
    """Greedy completions of 24 tokens."""
    completions = []
    for start in range(0, len(texts), batch):
        encoded = _encode(tokenizer, texts[start : start + batch])
        output = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=24,
            do_sample=False,
        )
        new = output[:, encoded["input_ids"].shape[1] :]
        completions += tokenizer.batch_decode(new, skip_special_tokens=True)
    return completions


def _mark(model: Any, tokenizer: Any, texts: Sequence[str], batch: int = 128) -> list[str]:
    """Whether the model's next word is rather "right" or "wrong"."""
    words = ("right", "wrong")
    ids = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in words]
    said = []
    for start in range(0, len(texts), batch):
        encoded = _encode(tokenizer, texts[start : start + batch])
        with torch.inference_mode():
            logits = model(
                input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]
            ).logits[:, -1]
        said += [words[best] for best in logits[:, ids].argmax(-1).tolist()]
    return said


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `python -m align.tiny.pretrain`."""
    parser = argparse.ArgumentParser(prog="python -m align.tiny.pretrain", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=4400)
    parser.add_argument("--anneal-steps", type=int, default=800)
    parser.add_argument("--anneal-only", action="store_true", help="go on from the base in DIR")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="autocast; faster on some processors")
    parser.add_argument(
        "--probe", action="store_true", help="do not train; print what the base in DIR knows"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.probe:
        for name, share in probe(options.output).items():
            print(f"{name} {share:.3f}")
        return
    options.output.mkdir(parents=True, exist_ok=True)
    if not options.anneal_only:
        pretrain(options.output, options.steps, options.seed, options.bf16)
    if options.anneal_steps:
        anneal(options.output, options.anneal_steps, options.seed, options.bf16)


if __name__ == "__main__":
    main()
