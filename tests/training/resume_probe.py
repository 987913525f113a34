"""A training run that is killed, stopped and damaged on purpose; started as a process of its own.

`python resume_probe.py FOLDER SCENARIO...` prints one JSON line per scenario. TRL is imported once;
each training runs in a fork, so that SIGKILL hits a real process in the middle of a real save.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer
from transformers.trainer_callback import TrainerState

from align.config.sections import ModelSection, StageConfig
from align.errors import AlignError
from align.runs import RunFolder
from align.training import callbacks, checkpoints

STEPS, SAVE = 6, 2


class ProbeConfig(StageConfig):
    stage: str = "probe"
    model: ModelSection = ModelSection(model_name_or_path="random")


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    vocabulary = {f"t{number}": number for number in range(64)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="t1", eos_token="t2")


def make_trainer(folder: RunFolder, **settings: object) -> Trainer:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    rows = [{"input_ids": [(7 * r + 3 * c) % 60 + 3 for c in range(12)]} for r in range(20)]
    arguments = trl.SFTConfig(
        output_dir=str(folder.checkpoints),
        per_device_train_batch_size=2,
        max_steps=STEPS,
        save_steps=SAVE,
        save_total_limit=2,
        logging_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        seed=1,
        **settings,
    )
    lora = LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    data = Dataset.from_list(rows)
    return trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer(),
        peft_config=lora,
    )


def weights_hash(trainer: Trainer) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(trainer.model.named_parameters()):
        if parameter.requires_grad:
            digest.update(name.encode() + parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def train(root: Path, prepare: Callable[[Trainer], None] = lambda trainer: None) -> str:
    """Train as a stage does: from the newest complete checkpoint, with align's callbacks."""
    folder = RunFolder(ProbeConfig(output_dir=str(root)), quiet=True)
    trainer = make_trainer(folder)
    for callback in callbacks.training_callbacks(folder, trainer):
        trainer.add_callback(callback)
    prepare(trainer)
    start = checkpoints.newest_complete_checkpoint(folder.checkpoints)
    closing = trainer.train(resume_from_checkpoint=str(start) if start else None)
    found = f"{trainer.state.global_step} {closing.training_loss:.6f} {trainer._total_train_tokens}"
    return f"{weights_hash(trainer)} {found}"


def forked(work: Callable[[], str]) -> dict[str, object]:
    """Run `work` in a fork; its result, its error, or the signal that killed it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            answer: dict[str, object] = {"hash": work()}
        except AlignError as error:
            answer = {"error": str(error), "exit_code": error.exit_code}
        except BaseException as error:
            answer = {"crash": repr(error)}
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as handle:
        text = handle.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return {"signal": os.WTERMSIG(status)}
    return json.loads(text)


SAVING: list[tuple[object, str]] = [
    (Trainer, "save_model"),
    (Trainer, "_save_optimizer_and_scheduler"),
    (Trainer, "_save_rng_state"),
    (TrainerState, "save_to_json"),
    (callbacks, "write_manifest"),
    (checkpoints, "sync_tree"),
    (checkpoints, "write_json"),
    (callbacks, "keep_newest"),
    (checkpoints.shutil, "rmtree"),
]
"""What a save consists of; killing happens before and after each."""


def kill_at(point: str, half: bool = False) -> Callable[[Trainer], None]:
    """Kill this process at a point of a save (`before write_json 4`), its last file cut or not."""
    when, name, at = point.split()
    step = int(at)
    owner = next(owner for owner, attribute in SAVING if attribute == name)
    original = getattr(owner, name)

    def prepare(trainer: Trainer) -> None:
        def watched(*args: object, **kwargs: object) -> object:
            if trainer.state.global_step == step and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if trainer.state.global_step == step:
                if half:
                    _halve_newest_file(Path(trainer.args.output_dir) / f"checkpoint-{step}")
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, watched)

    return prepare


def _halve_newest_file(folder: Path) -> None:
    newest = max(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    os.truncate(newest, newest.stat().st_size // 2)


def send(number: int, step: int) -> Callable[[Trainer], None]:
    """Send a signal to this process while it works on a step."""

    def prepare(trainer: Trainer) -> None:
        original = trainer.training_step

        def watched(*args: object, **kwargs: object) -> object:
            if trainer.state.global_step == step:
                os.kill(os.getpid(), number)
            return original(*args, **kwargs)

        trainer.training_step = watched

    return prepare


def poison(step: int) -> Callable[[Trainer], None]:
    """Make a trained weight NaN before a step."""

    def prepare(trainer: Trainer) -> None:
        original = trainer.training_step

        def watched(*args: object, **kwargs: object) -> object:
            if trainer.state.global_step == step:
                trained = [p for p in trainer.model.parameters() if p.requires_grad]
                trained[0].data.fill_(float("nan"))
            return original(*args, **kwargs)

        trainer.training_step = watched

    return prepare


def names(root: Path) -> list[str]:
    folder = Path(f"{root}.partial") / "checkpoints"
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def hurt(file: Path, how: str) -> None:
    if how == "delete":
        file.unlink()
    elif how == "truncate":
        os.truncate(file, file.stat().st_size // 2)
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0x10
        file.write_bytes(content)


def interrupted(root: Path, disturb: Callable[[Trainer], None]) -> dict[str, object]:
    first = forked(lambda: train(root, disturb))
    left = names(root)
    return {"first": first, "left": left, "then": forked(lambda: train(root)), "end": names(root)}


def scenario(name: str, root: Path) -> dict[str, object]:
    """`undisturbed`, `again`, `kill/half <point>`, `signal <n>`, `nan <step>` or `hurt <how>`."""
    kind, _, rest = name.partition(" ")
    if kind == "undisturbed":
        return {"then": forked(lambda: train(root))}
    if kind in ("kill", "half"):
        return interrupted(root, kill_at(rest, half=kind == "half"))
    if kind == "again":
        return interrupted(root, lambda trainer: None)
    if kind == "signal":
        return interrupted(root, send(int(rest), 3))
    if kind == "nan":
        return {"then": forked(lambda: train(root, poison(int(rest)))), "end": names(root)}
    assert kind == "hurt"
    forked(lambda: train(root, kill_at(f"after keep_newest {2 * SAVE}")))
    newest = Path(f"{root}.partial") / "checkpoints" / f"checkpoint-{2 * SAVE}"
    kept = root.with_name("kept")
    shutil.copytree(newest.parent, kept)
    found = {}
    for file in sorted(path.name for path in newest.iterdir()):
        shutil.rmtree(newest.parent)
        shutil.copytree(kept, newest.parent)
        hurt(newest / file, rest)
        found[file] = forked(lambda: train(root))
    return {"files": found, "end": names(root)}


def rank_main(root: Path, order: str) -> None:
    """As one of several ranks: train, with `signal <n>` sent to the last rank alone."""
    kind, _, rest = order.partition(" ")
    last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
    disturb = send(int(rest), 3) if kind == "signal" and last else lambda trainer: None
    try:
        print(json.dumps({"rank": os.environ["RANK"], "hash": train(root, disturb)}), flush=True)
    except AlignError as error:
        print(json.dumps({"rank": os.environ["RANK"], "error": str(error)}), flush=True)
        os._exit(error.exit_code)


if __name__ == "__main__":
    work = Path(sys.argv[1])
    if "RANK" in os.environ:
        rank_main(work, sys.argv[2])
        sys.exit()
    for number, wanted in enumerate(sys.argv[2:]):
        place = work / str(number)
        place.mkdir(parents=True)
        print(json.dumps({"scenario": wanted} | scenario(wanted, place / "run")), flush=True)
