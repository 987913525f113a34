"""Reduced precision: what runs begins exactly, and what would lose gradients is refused."""

import math

import pytest
import torch
import yaml
from ppo_runs import figures, make_trainer, ppo_config, same, trained, weights

from align.config.load import load_stage
from align.errors import AlignError
from align.training.arguments import ppo_arguments
from align.training.fitting import fit

SHAPES = {
    "plain": {},
    "value on the policy": {"value_model": "policy"},
    "full": {"lora": {"use_peft": False}, "trainer": {"learning_rate": 1e-3}},
    "reduced weights": {"model": {"dtype": "bfloat16"}},
    "two passes, recomputed": {"num_ppo_epochs": 2, "trainer": {"gradient_checkpointing": True}},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_autocast_begins_exactly_and_learns(llama, tmp_path, shape):
    more = SHAPES[shape]
    settings = {**more, "trainer": {**more.get("trainer", {}), "bf16": True}}
    config = ppo_config(llama, tmp_path, **settings)
    trainer = make_trainer(config)
    seen = []
    playing = trainer.collector.forward.hidden

    def hidden(model, flat):
        seen.append(torch.is_autocast_enabled("cpu"))
        return playing(model, flat)

    trainer.collector.forward.hidden = hidden
    before = weights(trainer)
    fit(trainer, trainer.folder)
    assert seen
    assert all(seen)
    folder = trainer.folder.path
    # Equal passes over equal weights round alike: no tolerance where the head is frozen.
    assert figures(folder, "objective/kl")[0] == 0.0
    assert figures(folder, "objective/kl_k3")[0] == 0.0
    near = 1e-5 if shape == "full" else 0.0
    for key in ("val/ratio_min", "val/ratio_max"):
        assert figures(folder, key)[0] == pytest.approx(1.0, abs=near)
    for key in ("loss/policy_avg", "loss/value_avg", "grad_norm/policy", "grad_norm/value"):
        assert all(math.isfinite(value) for value in figures(folder, key))
    after = weights(trainer)
    assert all(weight.dtype is torch.float32 for weight in after.values())
    assert all(bool(torch.isfinite(weight).all()) for weight in after.values())
    policy = [n for n in after if n.startswith("policy.") and ".value." not in n]
    assert any(not torch.equal(before[name], after[name]) for name in policy)


def test_autocast_learns_what_float32_learns(llama, tmp_path):
    """The first update's value loss and gradient, up to the rounding of bfloat16's eight bits."""
    found = []
    for bf16 in (False, True):
        config = ppo_config(
            llama,
            tmp_path,
            output_dir=str(tmp_path / f"run-{bf16}"),
            trainer={"bf16": bf16, "max_steps": 1},
            generation={"temperature": 1e-4},  # the most likely tokens: the same texts for both
        )
        folder = trained(config).folder.path
        found.append([figures(folder, key)[0] for key in ("loss/value_avg", "grad_norm/value")])
    assert found[1] == pytest.approx(found[0], rel=0.05)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("value_model", ["adapter", "policy"])
def test_the_kept_pass_of_the_first_minibatch_changes_no_bit(llama, tmp_path, bf16, value_model):
    """The first update takes the head's pass from looking at the rollout; a run without it ends the same."""
    ends, taken = [], []
    for keep in (True, False):
        config = ppo_config(
            llama,
            tmp_path,
            output_dir=str(tmp_path / f"run-{keep}"),
            value_model=value_model,
            num_ppo_epochs=2,
            trainer={"bf16": bf16, "max_steps": 8},
        )
        trainer = make_trainer(config)
        forward = trainer.collector.forward
        completions = forward.completions

        def spied(model, flat, *, entropy=True, known=None, keep=keep, completions=completions):
            found = completions(model, flat, entropy=entropy, known=known if keep else None)
            if known is not None:
                taken.append(known.again(found[2]) is not None)
            return found

        forward.completions = spied
        fit(trainer, trainer.folder)
        assert not trainer.collector.kept
        ends.append(weights(trainer))
    # Two rollouts, the first minibatch of which has two micro-batches; both runs.
    assert taken == [True] * 8
    assert same(*ends)


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"trainer": {"extra": {"fp16": True}}}, "trainer.extra.fp16"),
        ({"model": {"dtype": "float16"}}, "model.dtype"),
    ],
)
def test_float16_is_refused_with_the_recipe(llama, tmp_path, more, key):
    config = ppo_config(llama, tmp_path)
    recipe = config.model_dump(mode="json", exclude_unset=True)
    recipe["scorer"] = {"reward_funcs": {"contains": 1.0}}
    for section, values in more.items():
        recipe[section] = {**recipe[section], **values}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"stage": "ppo", **recipe}))
    with pytest.raises(AlignError, match="trains in float16") as error:
        load_stage(path)
    (problem,) = error.value.problems
    assert f"`{key}`" in problem.message


def test_float16_of_a_launcher_is_refused_too(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(AlignError, match="trains in float16") as error:
        ppo_arguments(ppo_config(llama, tmp_path), tmp_path)
    assert "mixed_precision" in str(error.value)
