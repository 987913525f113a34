"""Plans of recipes: what flows from stage to stage, what is known and what is not, and what is said."""

import json
from pathlib import Path

import pytest

from align.cli import main
from align.config.sections import DataSection
from align.plan import stages
from align.plan.gpus import find_gpu
from align.plan.report import make_plan
from align.plan.rows import rows_of, sliced
from align.plan.setting import Setting
from align.plan.speed import generation_seconds, training_seconds
from align.plan.view import show_plan

SFT = """\
stage: sft
output_dir: runs/sft
model: {model_name_or_path: meta-llama/Llama-3.1-8B, dtype: bfloat16}
data: {dataset_name: rows.jsonl, max_length: 1024}
trainer: {per_device_train_batch_size: 2, gradient_accumulation_steps: 4}
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    row = {
        "messages": [
            {"role": "user", "content": "x" * 396},
            {"role": "assistant", "content": "y" * 404},
        ]
    }
    Path("rows.jsonl").write_text(f"{json.dumps(row)}\n" * 1000)
    Path("mine.yaml").write_text(SFT)


def stage_of(recipe, *sets, **options):
    made = make_plan(recipe, sets=sets, **options)
    (stage,) = made.stages
    return stage, made.problems[stage.name]


def test_local_rows_are_counted_and_measured():
    stage, problems = stage_of("mine.yaml")
    assert stage.rows == 1000
    assert stage.steps == 125
    # (396 + 404 characters, and the two words of the roles) / 4
    assert stage.tokens == pytest.approx(1000 * 204, rel=0.02)
    assert not stage.tokens_are_bound
    assert stage.trainable == 41_943_040
    assert problems == []


def test_more_gpus_take_fewer_steps_and_hold_buckets_of_gradients():
    one, four = (stage_of("mine.yaml", gpus=gpus)[0] for gpus in (1, 4))
    assert four.steps == 32
    assert four.seconds == pytest.approx(one.seconds * 32 / 125)


def test_the_largest_micro_batch_fits_and_the_next_does_not():
    stage, _ = stage_of("mine.yaml", gpu="4090")
    most = stage.largest_micro_batch
    size = "trainer.per_device_train_batch_size="
    assert stage_of("mine.yaml", f"{size}{most}", gpu="4090")[0].fits(find_gpu("4090"))
    assert not stage_of("mine.yaml", f"{size}{most + 1}", gpu="4090")[0].fits(find_gpu("4090"))


def test_full_fine_tuning_of_70b_on_one_small_card_names_a_way_out():
    stage, problems = stage_of(
        "mine.yaml",
        "model.model_name_or_path=meta-llama/Llama-3.1-70B",
        "model.dtype=auto",
        "lora.use_peft=false",
        gpu="4090",
    )
    assert stage.way == "full"
    assert stage.largest_micro_batch == 0
    told = {problem.where: problem for problem in problems}
    assert "per GPU" in told["sft"].message
    assert "QLoRA" in told["sft"].hint
    assert "on one L40S" in told["sft"].hint
    assert "1e-5" in told["trainer.learning_rate"].hint
    assert "fused" in told["trainer.optim"].hint


@pytest.mark.parametrize(
    ("sets", "gpu", "where"),
    [
        (["lora.use_peft=false"], "b200", "model.dtype"),
        ([], "t4", "model.dtype"),
        (["model.attn_implementation=flash_attention_2"], "t4", "model.attn_implementation"),
        (["data.max_length=200000"], "h100", "data.max_length"),
        (
            ["model.model_name_or_path=mixtral-8x7b", "model.load_in_4bit=true"],
            "h100",
            "model.load_in_4bit",
        ),
        (["trainer.per_device_train_batch_size=500"], "h100", "sft"),
    ],
)
def test_known_bad_combinations(sets, gpu, where):
    _, problems = stage_of("mine.yaml", *sets, gpu=gpu)
    assert where in [problem.where for problem in problems]
    assert all(problem.hint for problem in problems)


def test_shares_of_weights_are_counted_as_shares():
    full = ["lora.use_peft=false", "launch.num_processes=8"]
    whole, _ = stage_of("mine.yaml", *full, gpu="h100")
    shares, problems = stage_of("mine.yaml", *full, "launch.accelerate=fsdp2", gpu="h100")
    # float32 weights, gradients and two moments, over eight GPUs.
    assert shares.memory.states == pytest.approx(16 * shares.shape.parameters / 8, rel=0.3)
    assert shares.memory.weights == pytest.approx(4 * 8.03e9 / 8, rel=0.01)
    assert shares.memory.total < 0.4 * whole.memory.total
    assert not [problem for problem in problems if problem.where == "model.dtype"]


def test_qlora_needs_less_and_its_adapter_is_kept_in_16_bits():
    lora, _ = stage_of("mine.yaml")
    qlora, _ = stage_of("mine.yaml", "model.load_in_4bit=true")
    assert qlora.way == "QLoRA r 16"
    assert qlora.memory.total < 0.6 * lora.memory.total
    assert qlora.disk["artifact"] == 2 * 41_943_040


def test_the_base_flows_through_a_pipeline():
    made = make_plan("llama3-8b/pipeline")
    shapes = {stage.name: stage.shape.parameters for stage in made.stages}
    assert set(shapes.values()) == {8_030_261_248}
    names = [name for stage in made.stages for name in stage.downloads]
    assert names.count("meta-llama/Meta-Llama-3-8B") == 1
    by_name = {stage.name: stage for stage in made.stages}
    assert by_name["best"].rows == 20_000
    assert by_name["dpo"].rows == 20_000  # one pair per prompt at most
    assert made.seconds == pytest.approx(sum(stage.seconds for stage in made.stages))


def test_rounds_are_planned_stage_by_stage():
    """Rows of kept rounds add up, prompts are shared out, an average costs no GPU time."""
    made = make_plan("llama3.1-8b/rounds")
    by_name = {stage.name: stage for stage in made.stages}
    assert [by_name[f"preferences@{n}"].rows for n in (1, 6)] == [5000, 5000]
    kept = 61_135  # UltraFeedback's pairs, and those of the rounds so far; 2 % are held out
    rows = [by_name[f"reward@{n}"].rows for n in (1, 2, 6)]
    assert rows == [
        count - round(0.02 * count) for count in (kept + 5000, kept + 10000, kept + 30000)
    ]
    assert {by_name[f"dpo@{n}"].rows for n in range(1, 7)} == {5000}
    mean = by_name["mean@1"]
    assert (mean.memory, mean.seconds) == (None, 0.0)
    assert mean.disk["artifact"] == 2 * 8_030_261_248
    assert any("about 60 GiB of the machine's own memory" in note for note in mean.notes)
    assert made.seconds is not None


def test_averaged_adapters_have_all_their_ranks():
    text = """
output_dir: runs/a
stages:
  one: {stage: sft, model: {model_name_or_path: llama-3.1-8b}, data: {dataset_name: openai/gsm8k}}
  two: {stage: sft, model: {model_name_or_path: llama-3.1-8b}, data: {dataset_name: openai/gsm8k}}
  mean: {stage: average, models: {one: $one, two: $two}}
  cut: {stage: average, models: {one: $one, two: $two}, method: svd}
"""
    Path("mean.yaml").write_text(text)
    by_name = {stage.name: stage for stage in make_plan("mean.yaml").stages}
    one = by_name["one"].trainable
    assert (by_name["mean"].trainable, by_name["cut"].trainable) == (2 * one, one)


def test_a_reward_model_with_weights_of_its_own_counts():
    made = make_plan("llama3.1-70b/pipeline", with_stages=("ppo",))
    alone, _ = stage_of("llama3.1-70b/ppo")
    ppo = next(stage for stage in made.stages if stage.name == "ppo")
    assert 14e9 < ppo.memory.total - alone.memory.total < 18e9  # 8B in 16 bits


def test_a_stage_recipe_finds_the_base_in_the_recipe_that_writes_its_model():
    stage, _ = stage_of("llama3-8b/dpo")
    assert stage.shape.parameters == 8_030_261_248
    assert stage.rows is None
    assert stage.steps is None
    assert stage.seconds is None
    assert stage.seconds_per_1k > 0


PPO = """\
stage: ppo
output_dir: runs/ppo
model: {model_name_or_path: meta-llama/Llama-3.1-8B-Instruct, dtype: bfloat16}
data: {dataset_name: openai/gsm8k, dataset_config: main, max_length: 512}
scorer: {reward_model: org/reward}
total_episodes: 4096
"""


def test_ppo_by_its_episodes():
    Path("ppo.yaml").write_text(PPO)
    stage, _ = stage_of("ppo.yaml")
    assert stage.steps == 4096 // (8 * 4)
    assert stage.trainable == 2 * 41_943_040  # policy and value
    policy_only, _ = stage_of("ppo.yaml", "value_model=policy")
    assert policy_only.trainable == 41_943_040
    assert policy_only.seconds < stage.seconds


def test_a_rollout_that_does_not_fit_names_its_own_batch():
    Path("ppo.yaml").write_text(PPO)
    stage, problems = stage_of("ppo.yaml", "generation.generation_batch_size=1024")
    assert stage.memory.phase == "rollout"
    assert "generation_batch_size" in problems[0].hint


def test_a_model_that_no_gpu_holds():
    _, problems = stage_of("mine.yaml", "model.model_name_or_path=deepseek-v3")
    assert "smaller model" in problems[0].hint


def test_a_kind_without_a_planner_gets_a_line(monkeypatch):
    monkeypatch.delitem(stages.PLANNERS, "sft")
    stage, problems = stage_of("mine.yaml")
    assert "not planned" in stage.notes[0]
    assert stage.memory is None
    assert problems == []


def test_an_unknown_model_is_told_and_the_rows_are_planned():
    stage, _ = stage_of("mine.yaml", "model.model_name_or_path=org/other")
    assert stage.rows == 1000
    assert "not known offline" in stage.notes[0]
    assert stage.fits(find_gpu("h100")) is None


@pytest.mark.parametrize(
    ("split", "count", "rows"),
    [
        ("train", 100, 100),
        ("train[:10%]", 100, 10),
        ("train[90%:]", 100, 10),
        ("train[20:50]", 100, 30),
        ("train[-5:]", 100, 5),
        ("train[:5000]", 100, 100),
        ("train[:5000]", None, 5000),
        ("train[:10%]", None, None),
        ("train", None, None),
    ],
)
def test_slices(split, count, rows):
    assert sliced(count, split) == rows


def test_rows_of_cards_and_of_what_is_not_here():
    gsm = rows_of(DataSection(dataset_name="openai/gsm8k", dataset_config="main"))
    assert (gsm.count, gsm.downloads) == (7473, ("openai/gsm8k",))
    other = rows_of(DataSection(dataset_name="org/rows", max_samples=10))
    assert (other.count, other.tokens) == (10, None)
    gone = rows_of(DataSection(dataset_name="runs/x/artifact/pairs.jsonl"))
    assert gone.count is None
    assert "earlier run" in gone.source


def test_time_grows_with_what_there_is_to_do():
    stage, _ = stage_of("mine.yaml")
    given, gpu = stage.training, find_gpu("h100")
    base = training_seconds(given, gpu, length=1024)
    assert training_seconds(given, gpu, length=1024, passes=1) > base
    assert training_seconds(given, find_gpu("a100"), length=1024) > base
    few, many = (
        generation_seconds(
            stage.shape, gpu, weights=16e9, prompts=100, samples=samples, prompt=100, new=100, batch=64
        )
        for samples in (1, 16)
    )  # fmt: skip
    assert few < many < 16.1 * few


@pytest.mark.parametrize("width", ["80", "120"])
def test_a_pipeline_fits_on_a_screen(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", width)
    show_plan(make_plan("llama3-8b/pipeline"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= int(width)


def test_model_names_cannot_steer_the_terminal(capsys):
    show_plan(
        make_plan(
            "mine.yaml", sets=["model.model_name_or_path=llama-3.1-8b", "output_dir=a\x1b[31m"]
        )
    )
    assert "\x1b[31m" not in capsys.readouterr().out


def call(*words):
    with pytest.raises(SystemExit) as end:
        main(words)
    return end.value.code or 0


def test_json(capsys):
    assert call("plan", "mine.yaml", "--gpu", "4090", "--gpus", "2", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    (stage,) = found["stages"]
    assert stage["memory"]["total"] == pytest.approx(
        sum(
            value
            for name, value in stage["memory"].items()
            if name not in ("total", "states", "phase")
        )
    )
    assert stage["gpus"] == 2
    assert stage["fits"] is True
    assert found["fewest_gpus"]["meta-llama/Llama-3.1-8B"]["inference"]["FP16"] == 1


def test_a_wrong_gpu_is_a_mistake_with_a_way_out(capsys):
    assert call("plan", "mine.yaml", "--gpu", "h1000") == 2
    assert "did you mean `H100`?" in capsys.readouterr().err


def test_qlora_in_full_is_refused_with_the_recipe(capsys):
    sets = ("--set", "lora.use_peft=false", "--set", "model.load_in_4bit=true")
    assert call("plan", "mine.yaml", *sets) == 2
    assert "lora.use_peft: true" in capsys.readouterr().err


def test_setting_needs_no_recipe():
    assert Setting(find_gpu("l4"), 1, Path()).results == {}


@pytest.mark.slow
def test_exact_says_what_the_formulas_say(capsys):
    tiny = SFT.replace("meta-llama/Llama-3.1-8B", "recipes/tiny/base")
    Path("tiny.yaml").write_text(tiny)
    assert call("plan", "tiny.yaml", "--exact", "--json") == 0
    (counted,) = json.loads(capsys.readouterr().out)["exact"]
    assert counted["trainable"] > 0
    assert sum(counted["parts"].values()) == counted["peak"]
    assert counted["formula"] == pytest.approx(counted["peak"], rel=0.1)
