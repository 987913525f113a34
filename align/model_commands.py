"""The commands around finished runs, models and the Hub. As light as `cli.py` until they work."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from align.answers import print_json
from align.errors import fail
from align.recipe_commands import Json
from align.startup import make_ready

if TYPE_CHECKING:
    from align.config.draft import Override


def _check_choice(flag: str, value: str, choices: Any) -> None:
    """Refuse a value that is none of a Literal's."""
    known = ", ".join(get_args(choices))
    if value not in get_args(choices):
        fail(f"no such choice: {value}", where=flag, hint=f"one of {known}")


def merge(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_ADAPTER", help="Run folder, adapter or Hub id.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    dtype: Annotated[
        str, typer.Option(help="Type of the saved weights: bfloat16, float16 or float32.")
    ] = "bfloat16",
    data: Annotated[
        str | None, typer.Option(help="Text of the proof: file or card; the run's rows if unset.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of --data.")] = "train",
    max_kl: Annotated[
        float, typer.Option("--max-kl", help="Highest mean KL to the adapter, nats per token.")
    ] = 1e-3,
    onto: Annotated[
        str, typer.Option(help="QLoRA: `trained` (dequantized base) or `original` weights.")
    ] = "trained",
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base, and prove that the result answers as it did."""
    make_ready()
    from align.models.merging import Dtype, Onto, merge
    from align.views import print_merge

    _check_choice("--dtype", dtype, Dtype)
    _check_choice("--onto", onto, Onto)
    report = merge(
        source,
        output,
        dtype=dtype,  # type: ignore[arg-type]
        data=data,
        split=split,
        max_kl=max_kl,
        onto=onto,  # type: ignore[arg-type]
    )
    if as_json:
        print_json(report)
    else:
        print_merge(str(output), report)


def push(
    recipe: str | None, run: str | None, changes: "Sequence[str | Override]", *, dry_run: bool
) -> None:
    """`align push`: a run folder that is named, or the stage of a recipe with a folder of its own."""
    from align.config.draft import Override
    from align.config.load import load_stage
    from align.hub.push import Push, list_files, push
    from align.runs import run_stage

    given = [Override("run", run, "RUN")] if run is not None else []
    places = [one if isinstance(one, str) else f"{one.key}=" for one in changes]
    direct = recipe is None and not any(one.startswith("output_dir=") for one in places)
    if direct:  # nothing is written but what the push itself needs
        given.append(Override("output_dir", "none"))
    config: Any = load_stage(recipe, [*given, *changes], stage="push").config
    make_ready()
    asked = Push.of(Path(config.run), config.hub)
    if dry_run:
        list_files(asked)
    elif direct:
        push(asked)
    else:
        run_stage(config)


def runs(
    folder: Annotated[Path, typer.Argument(help="Where to look.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List the runs below a folder: state, stage, size, time, key metrics."""
    from align.status import runs_below

    if not folder.is_dir():
        fail("there is no such folder", where=str(folder), hint="name one, as in `align runs runs`")
    found = runs_below(folder)
    if as_json:
        print_json({"runs": [run.as_json() for run in found]})
        return
    if not found:
        fail(
            "no run lies below this folder",
            where=str(folder),
            hint="`align run PIPELINE` makes one",
        )
    from align.report.tables import show_status

    show_status(found, runs=True)


def report(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="A pipeline's folder, a run folder, or a recipe."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write; report.html in RUN if unset."),
    ] = None,
) -> None:
    """Write what a run did as one HTML file: verdict, curves, answers, recipe, cost. Works offline."""
    from align.report.html.writing import write_report
    from align.report.terminal import say
    from align.resources import display
    from align.selection import run_folder

    say(display(write_report(run_folder(run), output)), results=True)


def chat(
    model: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="Run, stage, adapter, folder or Hub id.")
    ],
    against: Annotated[
        str | None, typer.Option(metavar="OTHER", help="A second model, side by side.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="System text; the run's own if unset, '' for none.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.6,
    top_p: Annotated[float, typer.Option(min=0.001, max=1, help="Nucleus.")] = 0.9,
    top_k: Annotated[int, typer.Option(min=0, help="0 keeps all tokens.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 42,
    chat_template: Annotated[
        str | None, typer.Option(metavar="NAME_OR_FILE", help="For a model that has none.")
    ] = None,
    load_in_4bit: Annotated[
        bool | None,
        typer.Option("--load-in-4bit/--no-load-in-4bit", help="As the run trained, if unset."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object for every turn.")
    ] = False,
) -> None:
    """Talk to a model, or to two side by side. Through a pipe: one turn a line."""
    make_ready()
    from align.chat.loop import chat
    from align.chat.speaker import Manner

    chat(
        model,
        against,
        manner=Manner(temperature, top_p, top_k, max_new_tokens, seed),
        system=system,
        chat_template=chat_template,
        in_4bit=load_in_4bit,
        as_json=as_json,
    )


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="Run, stage, adapter, folder or Hub id.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one.")],
    prompts: Annotated[
        str,
        typer.Option("--prompts", metavar="FILE", help="jsonl, csv, parquet, txt, card, Hub id."),
    ],
    judge: Annotated[
        str | None, typer.Option(metavar="NAME", help="`align show --judges` lists them.")
    ] = None,
    reward_model: Annotated[
        str | None, typer.Option(metavar="RUN", help="Decides where there is no judge.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The answers; a .md lies beside.")
    ] = Path("comparison.jsonl"),
    split: Annotated[str, typer.Option(help="Split of --prompts.")] = "train",
    as_chat: Annotated[
        bool, typer.Option("--as-chat", help="Ask plain text as a user's turn.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System text of every chat.")] = None,
    max_samples: Annotated[int | None, typer.Option(min=1, help="So many prompts.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.001, max=1, help="Nucleus.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers at once.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 42,
    as_json: Json = False,
) -> None:
    """Let two models answer the same prompts: both answers, a verdict each, the win rate."""
    make_ready()
    from align.evaluation.comparison import Comparison, compare
    from align.evaluation.comparison_view import comparison_view
    from align.report.terminal import console, say

    asked = Comparison(
        a=a,
        b=b,
        prompts=prompts,
        output=output,
        judge=judge,
        reward_model=reward_model,
        split=split,
        as_chat=as_chat,
        system=system,
        max_samples=max_samples,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
    )
    summary = compare(asked, quiet=as_json)
    if as_json:
        print_json(summary)
        return
    console(results=True).print(comparison_view(summary))
    say(f"answers: {output}, summary: {output.with_suffix('.md')}", results=True)


def export(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="Run, stage, adapter, folder or Hub id.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    format: Annotated[str, typer.Option("--format", help="gguf, vllm or ollama.")],
    adapter: Annotated[
        bool, typer.Option("--adapter", help="vLLM: the adapter over its base, not merged.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="Type of the weights: bfloat16, float16 or float32.")
    ] = "bfloat16",
    data: Annotated[
        str | None, typer.Option(help="Text of the merge's proof, as of `align merge`.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of --data.")] = "train",
    max_kl: Annotated[
        float, typer.Option("--max-kl", help="Highest mean KL to the adapter, nats per token.")
    ] = 1e-3,
    name: Annotated[str | None, typer.Option(help="What the server calls it.")] = None,
    system: Annotated[
        str | None, typer.Option(help="Ollama: system text; the run's own if unset.")
    ] = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option("--llama-cpp", metavar="DIR", help="gguf: its converter writes the .gguf."),
    ] = None,
    outtype: Annotated[
        str | None, typer.Option(help="gguf: the converter's own --outtype, such as q8_0.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a model for llama.cpp (gguf), vLLM or Ollama, with the commands that go on."""
    make_ready()
    from align.hub.export import Export, Format, export
    from align.models.merging import Dtype
    from align.views import print_export

    _check_choice("--format", format, Format)
    _check_choice("--dtype", dtype, Dtype)
    done = export(
        Export(
            source=source,
            output=output,
            format=format,  # type: ignore[arg-type]
            adapter=adapter,
            dtype=dtype,  # type: ignore[arg-type]
            data=data,
            split=split,
            max_kl=max_kl,
            name=name,
            system=system,
            llama_cpp=llama_cpp,
            outtype=outtype,
        )
    )
    if as_json:
        print_json(done)
    else:
        print_export(done)


COMMANDS: dict[str, Any] = {
    "runs": runs,
    "report": report,
    "chat": chat,
    "compare": compare,
    "merge": merge,
    "export": export,
}
"""Name -> what it does."""
