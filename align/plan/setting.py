"""What the planners of all stages share: the facts of a plan, what stages leave, models and rows by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from align.config.references import FORM
from align.config.sections import DataSection
from align.plan.gpus import Gpu
from align.plan.memory import SLACK, Memory, Training
from align.plan.origins import Origin, find_origin
from align.plan.rows import Rows, rows_of
from align.plan.shapes import Shape
from align.resources import display

UNBOUNDED = 2048
"""Tokens of a row where the recipe sets no bound."""

MOST_ROWS = 4096
"""Largest micro-batch that is looked for."""


@dataclass(frozen=True)
class Result:
    """What a stage leaves for later ones."""

    origin: Origin | None = None
    rows: Mapping[str, int] = field(default_factory=dict)
    """File of a `sample` artifact -> rows at most."""
    artifact: float | None = None
    """Bytes of the artifact."""


@dataclass
class Setting:
    """What all stages of a plan share."""

    gpu: Gpu
    gpus: int | None
    """Asked for on the command line; the recipe's own number of processes when None."""
    folder: Path
    """Folder of the recipe."""
    results: dict[str, Result] = field(default_factory=dict)
    fetched: set[str] = field(default_factory=set)
    """Hub ids that an earlier stage downloads already."""


@dataclass
class StagePlan:
    """One stage: what it takes, in bytes, tokens and seconds. None where nobody can know yet."""

    name: str
    kind: str
    model: str = ""
    way: str = ""
    """`full`, `LoRA r 16`, `QLoRA r 16`, or what the stage does with the model."""
    shape: Shape | None = None
    parameters: int | None = None
    trainable: int = 0
    rows: int | None = None
    rows_source: str = ""
    tokens: float | None = None
    tokens_are_bound: bool = False
    """Whether `tokens` is an upper bound (every row as long as it may be)."""
    steps: int | None = None
    memory: Memory | None = None
    gpus: int = 1
    micro_batch: int | None = None
    accumulation: int | None = None
    largest_micro_batch: int | None = None
    seconds: float | None = None
    seconds_per_1k: float | None = None
    disk: dict[str, float] = field(default_factory=dict)
    downloads: dict[str, float | None] = field(default_factory=dict)
    pushes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    training: Training | None = None
    """The step as the memory model saw it."""
    length: int = 0

    def fits(self, gpu: Gpu) -> bool | None:
        """Whether the peak is within the GPU's memory; None where the peak is not known."""
        return None if self.memory is None else self.memory.total <= gpu.usable


def origin_of(name: str, setting: Setting) -> Origin:
    """The model behind a Hub id, a folder, or the `$name` of an earlier stage."""
    match = FORM.fullmatch(name)
    if match is None:
        return find_origin(name, setting.folder)
    earlier = setting.results.get(match[1])
    if earlier is None or earlier.origin is None:
        return Origin(name, None)
    return replace(earlier.origin, label=name, download=None)


def read_rows(data: DataSection, setting: Setting) -> Rows:
    """The rows of a data section, those that earlier stages of the plan write included."""
    names = [data.dataset_name] if data.datasets is None else [one.path for one in data.datasets]
    matches = [FORM.fullmatch(name or "") for name in names]
    if not any(matches):
        return rows_of(data)
    counts: list[int | None] = []
    sources: list[str] = []
    for place, match in enumerate(matches):
        if match is not None:
            made = setting.results.get(match[1], Result()).rows
            counts.append(made.get(match[2] or ""))
            sources.append(f"`{match[1]}`")
        elif data.datasets is not None:
            alone = {
                "datasets": [data.datasets[place]],
                "test_split_size": None,
                "max_samples": None,
            }
            found = rows_of(data.model_copy(update=alone))
            counts.append(found.count)
            sources.append(found.source)
    known = [one for one in counts if one is not None]
    count = sum(known) if len(known) == len(counts) else None
    if count is not None and data.max_samples:
        count = min(count, data.max_samples)
    if count is not None and data.test_split_size:
        share = data.test_split_size
        count -= share if isinstance(share, int) else round(count * share)
    return Rows(count, None, f"at most, from {', '.join(sources)}")


def weights_of(model: Any, origin: Origin, *, full: bool) -> str:
    """The number format of the base, by the rules of `align.models.loading`."""
    if model.load_in_4bit:
        return "nf4-double" if model.use_bnb_nested_quant else "nf4"
    if model.load_in_8bit:
        return "int8"
    if model.dtype != "auto":
        return str(model.dtype)
    return "float32" if full else origin.dtype


def with_slack(memory: Memory) -> Memory:
    tensors = memory.total - memory.overhead
    return replace(memory, overhead=memory.overhead + SLACK * tensors)


def largest(fits: Callable[[int], bool]) -> int:
    """The largest micro-batch that fits, by bisection; 0 where not even one row does."""
    if not fits(1):
        return 0
    low, high = 1, MOST_ROWS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def length_of(data: DataSection, shape: Shape) -> int:
    return data.max_length or min(shape.positions or UNBOUNDED, UNBOUNDED)


def take_model(plan: StagePlan, config: Any, setting: Setting) -> Origin:
    plan.model = config.model.model_name_or_path
    origin = origin_of(plan.model, setting)
    adapter = config.model.adapter_name_or_path
    if adapter is not None:
        beside = origin_of(adapter, setting)
        origin = replace(origin, adapter=beside.adapter)
    plan.model = display(Path(origin.label)) if origin.label.startswith("/") else origin.label
    if origin.download and origin.shape and origin.download not in setting.fetched:
        plan.downloads[origin.download] = 2.0 * origin.shape.parameters
    if origin.shape is None:
        plan.notes.append(f"the shape of {origin.label} is not known before it is there")
    else:
        plan.shape, plan.parameters = origin.shape, origin.shape.parameters
    return origin


def take_rows(plan: StagePlan, config: Any, setting: Setting) -> Rows:
    rows = read_rows(config.data, setting)
    plan.rows, plan.rows_source = rows.count, rows.source
    plan.downloads.update({one: None for one in rows.downloads if one not in setting.fetched})
    return rows
