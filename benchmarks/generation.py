"""Sampling K answers per prompt: `align`'s slots against `model.generate`, taken in turns.

    python benchmarks/generation.py --model runs/tiny/sft/artifact
    python benchmarks/generation.py --model MODEL --batch-size 256 --max-new-tokens 512

Both get the same prompts, sorted by length, the same rows at once, stop tokens and limit;
`generate` gets `num_return_sequences`. Each is run once before the clock, then both in turns.
On a CPU the processor time of this process counts, so that other work on the machine disturbs
little; on a GPU the wall time.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from align.config.sections import DataSection
from align.generation.answers import load_prompts, stop_ids
from align.generation.sampler import inference, sample_completions
from align.models.loading import load_any_policy

Outcome = tuple[float, int]
"""Seconds, and tokens that belong to answers."""


def ours(model: Any, prompts: list[list[int]], stops: list[int], options: Any) -> int:
    """Tokens written by `sample_completions`."""
    rows = sample_completions(
        model,
        prompts,
        num_generations=options.samples,
        max_new_tokens=options.max_new_tokens,
        stop_ids=stops,
        pad_id=options.pad_id,
        batch_size=options.batch_size,
    )
    return sum(len(completion.all_ids) for row in rows for completion in row)


def theirs(model: Any, prompts: list[list[int]], stops: list[int], options: Any) -> int:
    """Tokens written by `generate`, without what follows a stop token."""
    at_once = max(1, options.batch_size // options.samples)
    stop, tokens = torch.tensor(stops, device=model.device), 0
    for first in range(0, len(prompts), at_once):
        batch = prompts[first : first + at_once]
        width = max(map(len, batch))
        padded = [[options.pad_id] * (width - len(ids)) + ids for ids in batch]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in batch]
        with inference(model):
            output = model.generate(
                input_ids=torch.tensor(padded, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                num_return_sequences=options.samples,
                max_new_tokens=options.max_new_tokens,
                eos_token_id=stops,
                pad_token_id=options.pad_id,
            )
        ended = torch.isin(output[:, width:], stop).long().cumsum(1)
        tokens += int(((ended == 0) | ((ended == 1) & torch.isin(output[:, width:], stop))).sum())
    return tokens


def timed(work: Callable[[], int]) -> Outcome:
    """Run once: processor seconds on a CPU, wall seconds on a GPU, and the tokens."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    started = clock()
    tokens = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - started, tokens


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or Hub id of a model or adapter")
    parser.add_argument("--data", default="tiny-world", help="data set with prompts")
    parser.add_argument("--split", default="test")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64, help="rows at once")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    """Print the medians and their ratio."""
    options = parsed()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    model, tokenizer = load_any_policy(options.model)
    data = DataSection(
        dataset_name=options.data, dataset_train_split=options.split, max_samples=options.prompts
    )
    options.pad_id = tokenizer.pad_token_id
    prompts = sorted((prompt.ids for prompt in load_prompts(data, tokenizer)), key=len)
    stops = stop_ids(model, tokenizer)
    rivals = {"align": ours, "generate": theirs}
    taken: dict[str, list[Outcome]] = {name: [] for name in rivals}
    for turn in range(options.repeats + 1):
        for name, rival in rivals.items():
            outcome = timed(partial(rival, model, prompts, stops, options))
            if turn:
                taken[name].append(outcome)
    for name, outcomes in taken.items():
        seconds = statistics.median(second for second, _ in outcomes)
        rate = statistics.median(tokens / second for second, tokens in outcomes)
        low, high = min(outcomes)[0], max(outcomes)[0]
        mean = statistics.mean(tokens for _, tokens in outcomes) / len(prompts) / options.samples
        print(
            f"{name:9} {seconds:7.2f} s ({low:.2f} to {high:.2f}), {rate:8.0f} tokens/s, "
            f"{mean:.1f} tokens per answer"
        )
    pairs = zip(taken["generate"], taken["align"], strict=True)
    ratios = [(slow / many) / (quick / some) for (slow, many), (quick, some) in pairs]
    print(f"seconds per token, generate over align: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
