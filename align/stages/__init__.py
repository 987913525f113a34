"""One stage, one file: its config and a `run` that tells the stage's story. The names are the commands."""

STAGES: dict[str, str] = {
    "sft": "align.stages.sft:SFTConfig",
    "reward": "align.stages.reward:RewardConfig",
    "sample": "align.stages.sample:SampleConfig",
    "dpo": "align.stages.dpo:DPOConfig",
    "ppo": "align.stages.ppo:PPOConfig",
    "average": "align.stages.average:AverageConfig",
    "eval": "align.stages.evaluate:EvalConfig",
    "push": "align.stages.push:PushConfig",
}
"""Command name -> where the stage's config class is; the module beside it has `run(config, folder)`."""

OUTSIDE = frozenset({"push"})
"""Stages whose result is elsewhere: what a run folder says of it is true of the moment it was made."""
