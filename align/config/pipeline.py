"""The pipeline file: named stages in order, which hand over by `$name`."""

from pydantic import Field, SerializeAsAny

from align.config.sections import Section, StageConfig


class PipelineStage(Section):
    """One named stage of a pipeline."""

    config: SerializeAsAny[StageConfig]
    """The stage's config; `$name` stands for the artifact of an earlier stage."""
    optional: bool = False
    """Run only when named by `--with`."""


class PipelineConfig(Section):
    """Stages by name, in the order in which they run."""

    output_dir: str
    """Folder of the runs; each stage writes to the folder of its name in it."""
    stages: dict[str, PipelineStage] = Field(min_length=1)
    """Name -> stage."""
