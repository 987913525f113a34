"""The model card of a run: what it is, where it comes from, what was measured, what it asks of you.

Everything in it comes from the run folder and the runs before it. Text from data and models is
shown as text (escaped, controls visible); names of this machine's folders never get here.
"""

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from align import __version__
from align.hub.facts import DataFacts, Measured, RunFacts, StageFacts
from align.hub.licences import Licence
from align.lineage import leaves
from align.report.terminal import sanitise

LONGEST = 800
"""Characters of a sample that are shown."""

KINDS = {
    "sft": "supervised fine-tuning",
    "reward": "reward model",
    "sample": "rejection sampling",
    "dpo": "direct preference optimization",
    "ppo": "proximal policy optimization",
    "average": "an average of weights",
}

PRIVATE_KEYS = ("output_dir", "launch.", "hub.", "trainer.report_to", "data.dataset_num_proc")
PATH_WORDS = ("path", "dataset_name", "datasets", "reward_model", "model", "system_prompt")
"""Recipe keys whose values name folders, or hold text of their own: they are not in the card."""


@dataclass(frozen=True)
class Upload:
    """How the model will be found on the Hub."""

    repo_id: str
    base: str | None
    """Hub id of the base; None for a model whose base is not known there."""
    base_revision: str | None
    adapter: bool
    reward: bool
    licence: Licence | None
    licence_file: bool = False
    """A copy of the licence goes with the weights."""
    merge: Mapping[str, Any] | None = None
    """Content of merge_report.json."""


def model_card(run: RunFacts, upload: Upload) -> ModelCard:
    """Write the card of a run, checked as far as that needs no network.

    Raises:
        ValueError: the card does not read back as what was written (a fault of align).
    """
    sections = (
        _head(run, upload),
        _lineage(run),
        _data(run),
        _measured(run),
        _merge(upload.merge),
        _samples(run),
        _settings(run.stage),
        _hardware(run),
        _loading(upload),
        _limits(run, upload),
        _licence(run, upload),
    )
    body = "\n\n".join("\n".join(lines) for lines in map(list, sections) if lines)
    metadata = _metadata(run, upload)
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n")
    check_card(card, metadata)
    return card


def check_card(card: ModelCard, metadata: ModelCardData) -> None:
    """Parse the card as the Hub's client does and compare it with what was meant."""
    again = ModelCard(str(card), ignore_metadata_errors=False)
    if str(again.data) != str(metadata):
        raise ValueError("the model card's metadata does not survive being written and read")


# --- metadata -------------------------------------------------------------------------------


def _metadata(run: RunFacts, upload: Upload) -> ModelCardData:
    hubs = [item.hub for item in _sources(run) if item.hub and "/" in item.hub]
    licence = upload.licence
    extra: dict[str, Any] = {}
    if upload.base:
        extra = {"base_model_relation": "adapter" if upload.adapter else "finetune"}
    tags = ["align", *dict.fromkeys(stage.kind for stage in run.stages)]
    return ModelCardData(
        model_name=upload.repo_id.rpartition("/")[2],
        base_model=upload.base,
        license=licence.hub if licence else None,
        library_name="peft" if upload.adapter else "transformers",
        pipeline_tag="text-classification" if upload.reward else "text-generation",
        datasets=list(dict.fromkeys(hubs)) or None,
        tags=[*tags, "lora"] if upload.adapter else tags,
        eval_results=[_eval_result(item, upload) for item in run.measured] or None,
        **extra,
    )


def _eval_result(item: Measured, upload: Upload) -> EvalResult:
    data = item.data
    name = data.name if data else "unknown"
    arguments = {"n": item.n, "low": item.low, "high": item.high, "confidence": item.confidence}
    if item.temperature is not None:
        arguments["temperature"] = item.temperature
    return EvalResult(
        task_type="text-classification" if upload.reward else "text-generation",
        dataset_type=(data.hub if data and data.hub else name),
        dataset_name=name,
        dataset_split=data.split if data else None,
        metric_type=item.metric,
        metric_name=_metric_name(item),
        metric_value=round(item.value, 6),
        metric_args={key: value for key, value in arguments.items() if value is not None},
    )


def _metric_name(item: Measured) -> str:
    words = [item.metric]
    words += [f"judge {item.judge}"] if item.judge else []
    words += [f"temperature {item.temperature:g}"] if item.temperature is not None else []
    if item.low is not None and item.high is not None:
        words.append(f"{item.confidence:.0%} interval {item.low:.3f} to {item.high:.3f}")
    return ", ".join(words)


def _sources(run: RunFacts) -> Iterator[DataFacts]:
    for stage in run.stages:
        yield from (item for item in stage.data if item.made_by is None)


# --- body -----------------------------------------------------------------------------------


def escape(text: Any) -> str:
    """Text as text: no HTML, no Markdown, no table cell that ends early, no control character."""
    plain = html.escape(sanitise(str(text)).replace("\n", " "))
    return "".join(f"\\{char}" if char in "\\`*_[]|~#!" else char for char in plain)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [f"| {' | '.join(map(escape, row))} |" for row in rows]
    if not lines:
        return []
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *lines]


def _head(run: RunFacts, upload: Upload) -> list[str]:
    kind = KINDS.get(run.stage.kind, run.stage.kind)
    name = upload.repo_id.rpartition("/")[2]
    revision = f" (revision `{upload.base_revision}`)" if upload.base_revision else ""
    base = f"[{upload.base}](https://huggingface.co/{upload.base}){revision}" if upload.base else ""
    what = "A LoRA adapter" if upload.adapter else "A full model"
    lines = [f"# {escape(name)}", ""]
    if upload.licence and upload.licence.built_with:
        lines += [f"**{upload.licence.built_with}**", ""]
    return [*lines, f"{what} from {kind}" + (f" on {base}." if base else ".")]


def _lineage(run: RunFacts) -> list[str]:
    rows = [
        (
            stage.name,
            KINDS.get(stage.kind, stage.kind),
            stage.fingerprint[:16],
            (stage.artifact or "")[:16],
        )
        for stage in run.stages
    ]
    head = ("stage", "what", "fingerprint", "artifact, sha256")
    return [
        "## Where it comes from",
        "",
        *_table(head, rows),
        "",
        "A fingerprint covers the recipe, the content of all inputs and the code of a stage.",
    ]


def _data(run: RunFacts) -> list[str]:
    rows = []
    for stage in run.stages:
        for item in stage.data:
            licence = "see that stage" if item.made_by else item.license or "not stated"
            read = "" if item.rows is None else f"{item.rows:,}"
            used = "" if stage.kept is None or len(stage.data) > 1 else f"{stage.kept:,}"
            digest = (item.sha256 or "")[:16]
            rows.append((stage.name, item.name, item.split or "", read, used, licence, digest))
    head = ("stage", "data", "split", "rows", "used", "licence", "sha256")
    table = _table(head, rows)
    return ["## Data", "", *table] if table else []


def _measured(run: RunFacts) -> list[str]:
    rows = [
        (
            item.metric,
            "" if item.temperature is None else f"{item.temperature:g}",
            f"{item.value:.3f}",
            "" if item.low is None else f"{item.low:.3f} to {item.high:.3f}",
            item.n or "",
            f"{item.data.name} {item.data.split or ''}".strip() if item.data else "",
            item.judge or "",
        )
        for item in run.measured
    ]
    if not rows:
        return ["## Measured", "", "This model has not been evaluated with align."]
    head = ("metric", "temperature", "mean", "95% interval", "n", "data", "judge")
    level = run.measured[-1].confidence
    return [
        "## Measured",
        "",
        *_table([part.replace("95%", f"{level:.0%}") for part in head], rows),
    ]


def _merge(report: Mapping[str, Any] | None) -> list[str]:
    if not report:
        return []
    text = report["text"]
    return [
        "## Merged weights",
        "",
        f"The adapter was merged in {report['merged_in']} into the {report['merged_into']} base and saved in "
        f"{report['dtype']}. Against the adapter, on {text['tokens']:,} tokens of {text['texts']} "
        f"texts ({text['rows']}): KL {report['kl_mean']:.2e} nats per token (99% "
        f"{report['kl_p99']:.2e}, largest {report['kl_max']:.2e}), the same most likely token in "
        f"{report['greedy_agreement']:.2%} of the positions.",
    ]


def _samples(run: RunFacts) -> list[str]:
    if not run.samples:
        return []
    lines = ["## Sample outputs", "", "Not chosen by hand: spread evenly over the evaluation."]
    for prompt, answer in run.samples:
        lines += ["", _verbatim(prompt), "", _verbatim(answer)]
    return lines


def _verbatim(text: str) -> str:
    """Text of a model or of data: HTML that can only be text."""
    cut = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    return f"<pre>{html.escape(sanitise(cut))}</pre>"


def _settings(stage: StageFacts) -> list[str]:
    rows = [
        (key, value)
        for key, value in leaves(dict(stage.recipe))
        if value is not None
        and not key.startswith(PRIVATE_KEYS)
        and not any(word in key.split(".")[-1] for word in PATH_WORDS)
        and not (isinstance(value, str) and "/" in value)
    ]
    return [
        "## Hyper-parameters",
        "",
        "<details><summary>The resolved recipe of the last stage</summary>",
        "",
        *_table(("key", "value"), rows),
        "",
        "</details>",
    ]


def _hardware(run: RunFacts) -> list[str]:
    facts = run.environment
    gpus = [f"{item['name']}" for item in facts.get("accelerators") or []]
    kinds = [f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)]
    cpu = f"{facts.get('cpu') or 'CPU'}, {facts.get('cpu_cores')} cores"
    hours = ", ".join(f"{stage.name} {_duration(stage.seconds)}" for stage in run.stages)
    versions = facts.get("versions") or {}
    named = [
        f"{name} {versions[name]}"
        for name in ("torch", "transformers", "trl", "peft")
        if name in versions
    ]
    return [
        "## Hardware and time",
        "",
        f"- {escape(', '.join(kinds) or cpu)}",
        f"- {escape(hours)}",
        f"- align {__version__}, {escape(', '.join(named))}",
    ]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _loading(upload: Upload) -> list[str]:
    repo, base = upload.repo_id, upload.base
    lines = ["## How to load it", ""]
    if upload.reward:
        code = _reward_code(repo, upload.adapter)
    elif upload.adapter:
        code = (
            "from peft import AutoPeftModelForCausalLM\n"
            "from transformers import AutoTokenizer\n\n"
            f'model = AutoPeftModelForCausalLM.from_pretrained("{repo}", dtype="auto")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{repo}")'
        )
    else:
        code = (
            "from transformers import pipeline\n\n"
            f'chat = pipeline("text-generation", "{repo}", dtype="auto")\n'
            'print(chat([{"role": "user", "content": "Hello"}], max_new_tokens=256))'
        )
    lines += ["```python", code, "```"]
    if upload.reward:
        return lines
    name = repo.rpartition("/")[2]
    serve = f"vllm serve {repo}"
    if upload.adapter:
        serve = f"vllm serve {base} --enable-lora --lora-modules {name}={repo} --tokenizer {repo}"
    return [*lines, "", "With vLLM:", "", "```sh", serve, "```"]


def _reward_code(repo: str, adapter: bool) -> str:
    loader = (
        "AutoPeftModelForSequenceClassification"
        if adapter
        else "AutoModelForSequenceClassification"
    )
    place = "peft" if adapter else "transformers"
    first = f"from {place} import {loader}\nfrom transformers import AutoTokenizer\n\n"
    labels = ", num_labels=1" if adapter else ""
    return (
        f'{first}model = {loader}.from_pretrained("{repo}"{labels})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")'
    )


def _limits(run: RunFacts, upload: Upload) -> list[str]:
    longest = (run.stage.recipe.get("data") or {}).get("max_length")
    lines = ["## Limits", ""]
    if longest:
        lines.append(f"- Trained on sequences of at most {longest} tokens.")
    if upload.reward:
        lines.append("- A score orders answers to one prompt; it is no probability and no grade.")
        lines.append(
            "- Optimizing against it goes wrong sooner or later: watch KL and other measures."
        )
    else:
        lines.append(
            "- It inherits the knowledge, the gaps and the biases of its base and its data."
        )
        lines.append("- No safety evaluation beyond the numbers above has been made.")
    if not run.measured:
        lines.append("- Nothing is known about its quality: there is no evaluation of it.")
    return lines


def _licence(run: RunFacts, upload: Upload) -> list[str]:
    lines = ["## Licence", ""]
    licence = upload.licence
    if licence is None:
        given = f" of [{upload.base}](https://huggingface.co/{upload.base})" if upload.base else ""
        return [
            *lines,
            f"The licence{given or ' of its base model'} and those of the data above apply.",
        ]
    copy = "`LICENSE` in this repository" if upload.licence_file else licence.page
    lines.append(
        f"Made with Llama {licence.version} weights, under the Llama {licence.version} Community "
        f"License ({copy}) and its acceptable use policy. Whoever passes this model on has to give "
        "a copy of that agreement with it and keep the file `NOTICE`"
        + (f', show "{licence.built_with}",' if licence.built_with else "")
        + (
            f' and begin the name of a derived model with "{licence.prefix}".'
            if licence.prefix
            else "."
        )
    )
    return [*lines, "", f"> {licence.notice.strip()}"]
