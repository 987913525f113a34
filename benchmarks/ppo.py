"""PPO: `align ppo` against TRL 1.12's `trl.experimental.ppo`, taken in turns, each in a process of its own.

    python -m venv .venv-trl && .venv-trl/bin/pip install torch==2.13.0 trl==1.12.0 peft
    python benchmarks/ppo.py --trl .venv-trl/bin/python                 # both shapes, written to results/ppo.md

Both sides get the same random Llama, prompts, response lengths (preset, spread as GSM8K answers), rank, batch, passes,
minibatches and temperature, one thread, float32. TRL trains a policy adapter and a full value model beside a full
reward model, as its trainer does; align trains two adapters on one base, or one adapter with a value head on it.
What counts is the processor time of the process from one rollout to the next (the first one is left out), split into
drawing, scoring and updating, and the peak of memory above what the process held before training.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"
os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
    },
    # Llama 3's vocabulary: the output head is nine tenths of the model, as its logits are of TRL's memory.
    "wide": {
        "hidden_size": 256,
        "intermediate_size": 896,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 128_256,
    },
}
EPISODES, MICRO, PASSES, RANK, ALPHA, TEMPERATURE = 16, 4, 4, 16, 32, 0.7
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIDES = ("trl", "align, value adapter", "align, value on the policy")


def prepare(folder: Path, shape: str) -> None:
    """Model, reward model, prompts and response lengths, made once for all sides."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
    )

    sys.path.insert(0, str(ROOT))
    from align.models.adapters import save_adapter
    from align.models.identity import write_base_identity

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes" / "tiny" / "base")
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=8192,
        rope_theta=500_000.0,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = folder / "model"
    LlamaForCausalLM(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    reward = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEAR, task_type="SEQ_CLS")
    adapter = get_peft_model(reward, lora)
    save_adapter(adapter, folder / "reward", base=str(model), revision="main")
    write_base_identity(folder / "reward", str(model), adapter.config.to_dict())
    tokenizer.save_pretrained(folder / "reward")
    draw = random.Random(1)
    lines = (ROOT / "datasets" / "gsm8k-sample" / "train.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    # About four characters are a token of Llama 3's; the tiny tokenizer would write twice as many.
    prompts = []
    for _ in range(64):
        question = draw.choice(rows)["question"]
        ids = tokenizer(question, add_special_tokens=False)["input_ids"][: len(question) // 4]
        prompts.append(tokenizer.decode(ids))
    lengths = [
        max(8, int(len(draw.choice(rows)["answer"]) / 4 * draw.uniform(0.5, 1.5)))
        for _ in range(EPISODES)
    ]
    with (folder / "prompts.jsonl").open("w", encoding="utf-8") as handle:
        for prompt in prompts:
            handle.write(json.dumps({"prompt": prompt}) + "\n")
    (folder / "lengths.json").write_text(json.dumps(lengths))


class Meter:
    """Processor time by phase and rollout, and the peak of memory above the start."""

    def __init__(self) -> None:
        self.phases = {"generate": 0.0, "score": 0.0, "update": 0.0}
        self.marks: list[tuple[float, dict[str, float]]] = []
        self.before = 0

    def start(self, models: Any) -> None:
        """Memory from here on; weights that are mapped from a file are read first, so that they are no growth."""
        for parameter in {p.data_ptr(): p for model in models for p in model.parameters()}.values():
            float(parameter.sum())
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.before = pages * resource.getpagesize()
        Path("/proc/self/clear_refs").write_text("5")

    def mark(self) -> None:
        """A rollout begins."""
        self.marks.append((time.process_time(), dict(self.phases)))

    def wrap(self, owner: Any, name: str, phase: str, unless: str | None = None) -> None:
        """Count a function's time for a phase, without what it spends in `unless`."""
        inner = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            begun, other = time.process_time(), self.phases[unless] if unless else 0.0
            result = inner(*arguments, **options)
            spent = self.phases[unless] - other if unless else 0.0
            self.phases[phase] += time.process_time() - begun - spent
            return result

        setattr(owner, name, timed)

    def report(self) -> dict[str, Any]:
        """Seconds a rollout, by phase, and megabytes."""
        peak = next(
            int(line.split()[1]) * 1024
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmHWM")
        )
        first, last, count = self.marks[1], self.marks[-1], len(self.marks) - 2
        seconds = (last[0] - first[0]) / count
        split = {k: (last[1][k] - first[1][k]) / count for k in self.phases}
        split["update"] = seconds - split["generate"] - split["score"]
        return {"seconds": seconds, "split": split, "megabytes": (peak - self.before) / 1e6}


def run_align(folder: Path, rollouts: int, value: str) -> dict[str, Any]:
    """Rollouts and updates by the stage itself, with preset response lengths."""
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    from align.config.load import load_stage
    from align.generation import slots
    from align.ppo import trainer as of_trainer
    from align.runs import run_stage

    lengths = json.loads((folder / "lengths.json").read_text())
    preset_lengths(slots, lengths)
    meter = Meter()
    kind = of_trainer.PPOTrainer
    collect = kind._collect
    initial = kind.__init__

    def begun(self: Any, *arguments: Any, **options: Any) -> None:
        initial(self, *arguments, **options)
        meter.wrap(self.collector, "draw", "generate")
        meter.wrap(self.collector, "collect", "score", unless="generate")
        meter.start([self.roles])

    def collected(self: Any, number: int) -> None:
        meter.mark()
        collect(self, number)

    kind.__init__, kind._collect = begun, collected
    recipe = {
        "stage": "ppo",
        "output_dir": tempfile.mkdtemp(dir=folder),
        "model": {"model_name_or_path": str(folder / "model")},
        "lora": {"lora_r": RANK, "lora_alpha": ALPHA, "lora_target_modules": LINEAR},
        "data": {"dataset_name": str(folder / "prompts.jsonl"), "max_length": 4096},
        "generation": {
            "max_new_tokens": max(lengths),
            "generation_batch_size": EPISODES,
            "temperature": TEMPERATURE,
        },
        "scorer": {"reward_model": str(folder / "reward")},
        "trainer": {
            "per_device_train_batch_size": MICRO,
            "gradient_accumulation_steps": EPISODES // MICRO,
            "gradient_checkpointing": False,
            "learning_rate": 1e-5,
            "save_steps": 10_000,
        },
        "value_model": value,
        "num_mini_batches": 1,
        "num_ppo_epochs": PASSES,
        "total_episodes": EPISODES * rollouts,
        "sample_rollouts": 10_000,
    }
    path = folder / "recipe.json.yaml"
    path.write_text(json.dumps(recipe))
    run_stage(load_stage(str(path)).config, quiet=True)
    meter.mark()
    return meter.report()


def preset_lengths(slots: Any, lengths: list[int]) -> None:
    """Let episode i of a rollout end after lengths[i] tokens, by the numbers that decide its tokens."""
    uniforms, choose = slots.uniforms, slots.choose

    def marked(seed: int, places: Any, steps: int) -> Any:
        found = uniforms(seed, places, steps)
        for row, (prompt, _) in enumerate(places):
            found[row, lengths[prompt % len(lengths)] - 1] = 2.0
        return found

    def until_marked(logits: Any, uniform: Any, decoding: Any) -> Any:
        tokens = choose(logits, uniform.clamp(max=0.999), decoding)
        stop = decoding.stop_ids[0]
        early = (tokens[:, None] == tokens.new_tensor(decoding.stop_ids)).any(1)
        tokens = tokens.masked_fill(early, stop + 20)
        return tokens.masked_fill(uniform >= 2.0, stop)

    slots.uniforms, slots.choose = marked, until_marked


def run_trl(folder: Path, rollouts: int) -> dict[str, Any]:
    """The same by TRL's trainer (in the interpreter that has TRL 1.12)."""
    import copy

    import torch
    import transformers

    torch.set_num_threads(1)
    import trl.experimental.ppo.ppo_trainer as module
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        StoppingCriteria,
        StoppingCriteriaList,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    transformers.logging.set_verbosity_error()
    lengths = json.loads((folder / "lengths.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    lines = (folder / "prompts.jsonl").read_text().splitlines()
    prompts = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines]
    policy = AutoModelForCausalLM.from_pretrained(folder / "model")
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
    arguments = PPOConfig(
        output_dir=tempfile.mkdtemp(dir=folder),
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=EPISODES // MICRO,
        num_mini_batches=1,
        num_ppo_epochs=PASSES,
        total_episodes=EPISODES * rollouts,
        response_length=max(lengths),
        temperature=TEMPERATURE,
        learning_rate=1e-5,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        num_sample_generations=0,
        local_rollout_forward_batch_size=EPISODES,
        disable_tqdm=True,
    )
    trainer = PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=copy.deepcopy(reward),
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in prompts]),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=LINEAR, task_type="CAUSAL_LM"
        ),
    )
    meter = Meter()

    class Preset(StoppingCriteria):  # type: ignore[misc]
        def __init__(self, begin: int) -> None:
            self.begin = begin

        def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
            return ids.shape[1] - self.begin >= torch.tensor(lengths)

    generate = module.generate

    def with_preset(model: Any, queries: Any, pad: int, config: Any) -> Any:
        inner = model.generate

        def preset(**options: Any) -> Any:
            ends = StoppingCriteriaList([Preset(queries.shape[1])])
            return inner(**options, stopping_criteria=ends, pad_token_id=pad)

        class Model:
            generate = staticmethod(preset)

        return generate(Model, queries, pad, config)

    module.generate = with_preset
    batch = module.batch_generation

    def begun(*arguments: Any, **options: Any) -> Any:
        meter.mark()
        return batch(*arguments, **options)

    module.batch_generation = begun
    meter.wrap(module, "batch_generation", "generate")
    forward = module.forward

    def scored(*arguments: Any, **options: Any) -> Any:
        started = time.process_time()
        result = forward(*arguments, **options)
        if not torch.is_grad_enabled():
            meter.phases["score"] += time.process_time() - started
        return result

    module.forward = scored
    meter.wrap(module, "get_reward", "score")
    meter.start([trainer.model, trainer.reward_model])
    trainer.train()
    meter.mark()
    return meter.report()


def run_side(side: str, folder: Path, rollouts: int, trl: str) -> dict[str, Any]:
    """One side in a fresh process."""
    python = trl if side == "trl" else sys.executable
    command = [python, __file__, "--side", side, "--work", str(folder), "--rollouts", str(rollouts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def compare(options: argparse.Namespace) -> None:
    """Both sides in turns for every shape; medians and their ratios go to the results."""
    results: dict[str, Any] = {}
    for shape in options.shapes:
        with tempfile.TemporaryDirectory() as work:
            prepare(Path(work), shape)
            runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
            for turn in range(options.turns):
                for side in SIDES:
                    found = run_side(side, Path(work), options.rollouts, options.trl)
                    runs[side].append(found)
                    print(
                        f"{shape} turn {turn}: {side}: {found['seconds']:.2f} s, {found['megabytes']:.0f} MB"
                    )
            results[shape] = {side: middle(found) for side, found in runs.items()}
            results[shape]["trl"]["rollouts"] = options.rollouts - 1
    file = RESULTS / "ppo.json"
    kept = json.loads(file.read_text()) if file.is_file() else {}
    write(kept | results)


def middle(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the turns."""
    return {
        "seconds": statistics.median(run["seconds"] for run in runs),
        "megabytes": statistics.median(run["megabytes"] for run in runs),
        "split": {k: statistics.median(run["split"][k] for run in runs) for k in runs[0]["split"]},
        "turns": [run["seconds"] for run in runs],
    }


def write(results: dict[str, Any]) -> None:
    """A table and the figures behind it."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "ppo.json").write_text(json.dumps(results, indent=2) + "\n")
    lines = [
        "# PPO against TRL 1.12",
        "",
        f"Made by `python benchmarks/ppo.py`: {EPISODES} episodes a rollout, {PASSES} passes,",
        f"micro-batches of {MICRO}, one thread, float32;",
        "processor seconds a rollout (medians over the turns, taken in turn) and memory above the loaded models.",
        "Measured: "
        + "; ".join(
            f"{shape} {len(sides['trl']['turns'])} turns of {sides['trl']['rollouts']} rollouts"
            for shape, sides in results.items()
        )
        + ".",
        "",
        "| shape | side | seconds | generate | score | update | MB above | speed | memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for shape, sides in results.items():
        base = sides["trl"]
        for side, found in sides.items():
            split = found["split"]
            lines.append(
                f"| {shape} | {side} | {found['seconds']:.2f} | {split['generate']:.2f} | {split['score']:.2f} | "
                f"{split['update']:.2f} | {found['megabytes']:.0f} | {base['seconds'] / found['seconds']:.2f}x | "
                f"{found['megabytes'] / base['megabytes']:.2f}x |"
            )
    text = "\n".join(lines) + "\n"
    (RESULTS / "ppo.md").write_text(text)
    print(text)


def main() -> None:
    """Compare, or be one side of the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trl", help="python with trl 1.12")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=3)
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    if options.side is None:
        if options.trl is None:
            parser.error("--trl PYTHON names the interpreter that has trl 1.12")
        compare(options)
        return
    if options.side == "trl":
        found = run_trl(options.work, options.rollouts)
    else:
        value = "policy" if options.side.endswith("policy") else "adapter"
        found = run_align(options.work, options.rollouts, value)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
