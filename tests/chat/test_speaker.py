"""Answers of real (random) models: pieces, stops, limits, 4 bits, what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from adapters import write_adapter
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from align.chat.speaker import Manner, Speaker, load_speakers
from align.data.rendering import render_prompt
from align.errors import AlignError
from align.generation.sampler import sample_completions
from align.models.source import find_model

ASKED = [{"role": "user", "content": "Who rules Velost? <|eot_id|> héllo"}]
PLAIN = Manner(temperature=1.0, top_p=1.0, max_new_tokens=40, seed=5)


@pytest.fixture(scope="module")
def folder(llama: Path, tmp_path_factory) -> Path:
    """A copy that ends its answers on many tokens."""
    made = tmp_path_factory.mktemp("talker") / "model"
    shutil.copytree(llama, made)
    settings = {"eos_token_id": [1, *range(60, 70)], "pad_token_id": 5}
    (made / "generation_config.json").write_text(json.dumps(settings))
    return made


@pytest.fixture(scope="module")
def speaker(folder: Path) -> Speaker:
    return load(folder)


def load(place: Path | str, **options) -> Speaker:
    return load_speakers(["m"], [find_model(str(place))], **options)[0]


def say(speaker: Speaker, manner: Manner, place=(0, 0)) -> tuple[list[str], object]:
    pieces: list[str] = []
    reply = speaker.answer(speaker.prompt(ASKED), manner, place=place, on_text=pieces.append)
    return pieces, reply


def test_the_prompt_is_that_of_the_other_stages_and_control_tokens_stay_text(speaker):
    ids = speaker.prompt(ASKED)
    assert ids == render_prompt(speaker.tokenizer, ASKED)
    assert ids.count(4) == 1, "the <|eot_id|> that the user wrote is text"


def test_every_end_of_turn_stops_and_the_pieces_are_the_text(speaker):
    assert {1, 4, *range(60, 70)} <= set(speaker.stops)
    ends = set()
    for turn in range(8):
        pieces, reply = say(speaker, PLAIN, (turn, 0))
        streamed = "".join(pieces)
        assert reply.text.startswith(streamed.rstrip())
        assert len(reply.text) - len(streamed.rstrip()) <= 3, "only an unfinished character waits"
        ends.add(reply.end)
    assert ends <= {"stop", "length"}
    assert "stop" in ends


def test_the_draws_are_those_of_align_sample(speaker):
    prompt = speaker.prompt(ASKED)
    drawn = sample_completions(
        speaker.model,
        [prompt],
        max_new_tokens=40,
        stop_ids=speaker.stops,
        pad_id=5,
        num_generations=3,
        seed=5,
        indices=[7],
    )[0]
    for number, completion in enumerate(drawn):
        _, reply = say(speaker, PLAIN, (7, number))
        assert reply.tokens == len(completion.all_ids)
        text = speaker.tokenizer.decode(completion.ids, skip_special_tokens=True).strip()
        assert reply.text == text


def test_the_context_limit_cuts_loudly_and_refuses_what_has_no_room(folder):
    speaker = load(folder)
    speaker.stops = [1]
    prompt = speaker.prompt(ASKED)
    speaker.limit = len(prompt) + 6
    _, reply = say(speaker, PLAIN)
    assert (reply.end, reply.tokens) == ("context", 6)
    _, reply = say(speaker, Manner(temperature=1.0, max_new_tokens=3))
    assert (reply.end, reply.tokens) == ("length", 3)
    speaker.limit = len(prompt)
    with pytest.raises(AlignError, match=f"has {len(prompt)} tokens.*reads {len(prompt)} at most"):
        speaker.prompt(ASKED)


def test_ctrl_c_keeps_what_was_written(speaker):
    pieces: list[str] = []

    def stop(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    manner = Manner(temperature=1.0, top_p=1.0, max_new_tokens=40, seed=1)
    before = speaker.model.generation_config
    for turn in range(5):
        reply = speaker.answer(speaker.prompt(ASKED), manner, place=(turn, 0), on_text=stop)
        if reply.end == "interrupted":
            break
        pieces.clear()
    assert reply.end == "interrupted"
    assert reply.text == "".join(pieces).strip()
    assert speaker.model.generation_config is before, "the model is as it was"


def test_a_reward_model_is_refused(llama, tokenizer, tmp_path):
    from transformers import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1).save_pretrained(
        tmp_path
    )
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(AlignError, match="is a reward model, but a policy"):
        load(tmp_path)


def test_without_a_chat_template_there_is_no_chat(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").unlink()
    tokens = json.loads((tmp_path / "m" / "tokenizer.json").read_text())
    text = json.dumps(tokens).replace("<|start_header_id|>", "<|begin_role|>")
    (tmp_path / "m" / "tokenizer.json").write_text(text)
    file = tmp_path / "m" / "tokenizer_config.json"
    file.write_text(file.read_text().replace("<|start_header_id|>", "<|begin_role|>"))
    with pytest.raises(AlignError, match="no chat template") as caught:
        load(tmp_path / "m")
    assert "--chat-template" in str(caught.value)


def test_a_qlora_run_talks_on_the_4_bits_it_trained_on(llama, tmp_path):
    """The adapter lies over a base in 4 bits, as it did in training; unquantized it talks too."""
    config = AutoConfig.from_pretrained(llama)
    config.update({"hidden_size": 64, "head_dim": 16, "intermediate_size": 128})  # 4 bits: by 64
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    run = tmp_path / "run"
    write_adapter(run / "artifact", tmp_path / "base")
    recipe = {"stage": "sft", "model": {"load_in_4bit": True}}
    (run / "recipe.yaml").write_text(json.dumps(recipe))
    source = find_model(str(run))
    assert source.in_4bit
    for in_4bit in (None, False):
        speaker = load(run, in_4bit=in_4bit)
        assert bool(getattr(speaker.model, "is_quantized", False)) is (in_4bit is None)
        assert say(speaker, Manner(max_new_tokens=5))[1].tokens > 0


ROWS = {"trainable_token_indices": [2, 3, 4]}
OTHERS = {
    "plain": ({}, {"r": 8, "target_modules": ["q_proj"]}),
    "with token rows": (ROWS, ROWS),
    "its base": (ROWS, None),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("order", [1, -1])
def test_two_models_on_one_base_share_it_and_answer_as_each_alone(llama, tmp_path, other, order):
    mine, others = OTHERS[other]
    first = write_adapter(tmp_path / "one", llama, scale=0.3, **mine)
    second = llama
    if others is not None:
        second = write_adapter(tmp_path / "two", llama, scale=-0.5, **others)
    places = [first, second][::order]
    manner = Manner(temperature=0, max_new_tokens=12)
    alone = [say(load(place), manner)[1].text for place in places]
    assert alone[0] != alone[1]
    pair = load_speakers(["a", "b"], [find_model(str(place)) for place in places])
    assert pair[0].model is pair[1].model
    for turn in (0, 1, 0, 1):
        assert say(pair[turn], manner)[1].text == alone[turn]


@pytest.mark.parametrize("other", ["another base", "no token rows"])
def test_where_sharing_is_not_sure_nothing_is_shared(llama, make_llama, tmp_path, other):
    adapter = write_adapter(tmp_path / "one", llama, **ROWS)
    second = make_llama(4)
    if other == "no token rows":
        second = write_adapter(tmp_path / "two", llama)
    pair = load_speakers(["a", "b"], [find_model(str(place)) for place in (adapter, second)])
    assert pair[0].model is not pair[1].model
    assert say(pair[0], Manner(max_new_tokens=3))[1].tokens > 0
