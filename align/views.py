"""What the light commands print: keys, resolved values, shipped recipes."""

import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any


def print_options(kind: str, pattern: str) -> bool:
    """The keys of a stage that have `pattern` in their name or sentence; False where none has."""
    from align.options import listing
    from align.report.terminal import say

    found = False
    for section, keys in listing(kind, pattern):
        say(section or kind, style="bold", results=True)
        for name, facts, doc in keys:
            say(f"  {name}: {facts}", style="cyan", results=True)
            say(f"      {doc}", results=True)
        found = True
    return found


def print_values(rows: Sequence[tuple[str, Any, str]]) -> None:
    """Key, value and origin in columns; what nobody set is dim."""
    from align.options import as_text
    from align.report.terminal import say

    shown = [(key, as_text(value), origin) for key, value, origin in rows]
    first = min(max((len(key) for key, _, _ in shown), default=0), 44)
    second = min(max((len(value) for _, value, _ in shown), default=0), 40)
    for key, value, origin in shown:
        style = "dim" if origin == "default" else ""
        say(f"{key:<{first}}  {value:<{second}}  {origin}".rstrip(), style=style, results=True)


def value_rows(
    config: Any, origins: Mapping[str, str], prefix: str = ""
) -> list[tuple[str, Any, str]]:
    """Every knob of a config with its value and where that comes from."""
    from align.config.fields import leaf_fields
    from align.config.sections import Section

    values = config.model_dump(mode="json")
    rows = []
    kind: type[Section] = type(config)
    for leaf in leaf_fields(kind):
        section, _, name = leaf.name.rpartition(".")
        value = (values[section] if section else values)[name]
        rows.append((f"{prefix}{leaf.name}", value, origins[leaf.name]))
    return rows


def print_recipes() -> None:
    """The shipped recipes: name, stage, first sentence of the header; in a terminal it is wrapped."""
    from align.report.terminal import say
    from align.resources import shipped_recipes

    recipes = shipped_recipes()
    widest = max((len(recipe.name) for recipe in recipes), default=0)
    indent = " " * (widest + 12)
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    for recipe in recipes:
        line = f"{recipe.name:<{widest}}  {recipe.kind:<8}  {recipe.summary}"
        width = max(columns, len(indent) + 20)
        say("\n".join(textwrap.wrap(line, width, subsequent_indent=indent)), results=True)


def print_names() -> None:
    """The registered judges and pair rules."""
    from align.registry import JUDGES, PAIR_RULES
    from align.report.terminal import say

    for title, names in (("judges", JUDGES), ("pair rules", PAIR_RULES)):
        say(title, style="bold", results=True)
        for name in sorted(names):
            say(f"  {name}", results=True)


def print_merge(output: str, report: Mapping[str, Any]) -> None:
    """The proof of a merge in three lines."""
    from align.report.terminal import say

    text = report["text"]
    say(f"{output}: merged in float32, saved in {report['dtype']}", results=True)
    say(
        f"  KL to the adapter {report['kl_mean']:.2e} nats per token (99% {report['kl_p99']:.2e}, "
        f"max {report['kl_max']:.2e}; bound {report['max_kl']:g}), same best token in "
        f"{report['greedy_agreement']:.2%} of {text['tokens']:,} positions ({text['texts']} texts, {text['rows']})",
        results=True,
    )
    if quantized := report["trained_quantized"]:
        cost = "" if report["merged_into"] == "dequantized" else ": what 4 or 8 bits had cost"
        say(
            f"  KL to the quantized model it was trained as {quantized['kl_mean']:.2e}, same best "
            f"token in {quantized['greedy_agreement']:.2%}{cost}",
            results=True,
        )


def print_export(done: Mapping[str, Any]) -> None:
    """What was written, and the commands that go on from there."""
    from align.report.terminal import say

    if done["merge"] is not None:
        print_merge(done["output"], done["merge"])
    say(f"{done['output']}: {', '.join(done['files'])}", results=True)
    say("to go on:", results=True)
    for command in done["commands"]:
        say(f"    {command}", results=True)
