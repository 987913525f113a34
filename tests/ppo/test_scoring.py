"""Reward functions, judges and reward models as scorers; what goes wrong is said with its place."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from align.errors import AlignError
from align.generation.answers import Prompt
from align.models.loading import load_reward_model
from align.ppo import scoring
from align.ppo.experience import Episode
from align.ppo.scoring import function_scorer, reward_model_scorer, weighted
from align.registry import JUDGES, REWARD_FUNCS

PROMPTS = [Prompt(n, [0, 7, 8], {"prompt": f"say {n}", "number": n}) for n in range(3)]


def episode(prompt: int, text: str, *, ended: bool = True) -> Episode:
    ids = [ord(letter) for letter in text]
    return Episode(prompt, [0, 7, 8], [*ids, 4] if ended else ids, ended, text)


EPISODES = [episode(2, "abc"), episode(0, "a"), episode(2, "")]


@pytest.fixture
def scored(monkeypatch):
    def scored(function, episodes=EPISODES):
        monkeypatch.setitem(REWARD_FUNCS, "mine", function)
        return function_scorer("mine", PROMPTS)(episodes)

    return scored


def test_a_function_gets_prompts_completions_and_columns_in_the_order_of_the_episodes(scored):
    seen = {}

    def function(prompts, completions, **columns):
        seen.update(prompts=prompts, completions=completions, columns=columns)
        return [len(text) for text in completions]

    assert scored(function) == [3.0, 1.0, 0.0]
    assert seen["prompts"] == ["say 2", "say 0", "say 2"]
    assert seen["completions"] == ["abc", "a", ""]
    assert seen["columns"] == {"number": [2, 0, 2]}


@pytest.mark.parametrize(
    "answer", [[1, 2.0, True], (1, 2, 1), np.array([1.0, 2, 1]), torch.tensor([1.0, 2, 1])]
)
def test_lists_tuples_and_arrays_are_numbers(scored, answer):
    assert scored(lambda **_: answer) == [1.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0, 2.0], "returned 2 scores for 3 completions"),
        ([1.0, float("nan"), 2.0], "nan.*no finite number"),
        ([1.0, 2.0, float("inf")], "inf.*no finite number"),
        ([1.0, None, 2.0], "None.*no finite number"),
        (["a", "b", "c"], "'a'.*no finite number"),
        ("abc", "'a'.*no finite number"),
        ([[1.0], [2.0], [3.0]], "no finite number"),
        (3.0, "returned float instead of a list"),
        (None, "returned NoneType instead of a list"),
        ({"score": 1.0}, "returned dict instead of a list"),
        (np.float64(3.0), "instead of a list"),
        (torch.tensor(3.0), "instead of a list"),
        ((score for score in (1.0, 2.0, 3.0)), "returned generator instead of a list"),
    ],
)
def test_a_wrong_answer_names_the_function(scored, answer, message):
    with pytest.raises(AlignError, match=message) as error:
        scored(lambda **_: answer)
    assert "mine" in str(error.value)


def test_a_bad_number_names_its_row(scored):
    with pytest.raises(AlignError, match="row 1"):
        scored(lambda **_: [1.0, float("nan"), 2.0])


def test_a_function_that_raises_is_an_answer_and_no_traceback(scored):
    def function(completions, **_):
        raise ZeroDivisionError("no luck")

    with pytest.raises(AlignError, match="raised ZeroDivisionError: no luck") as error:
        scored(function)
    assert "same command" in str(error.value)


def test_judges_are_reward_functions_too(monkeypatch):
    def judge(row, completion):
        return {"score": row["number"] + len(completion), "other": 0.0}

    monkeypatch.setitem(JUDGES, "length", judge)
    assert function_scorer("length", PROMPTS)(EPISODES) == [5.0, 1.0, 2.0]


def test_a_judge_may_name_its_arguments_as_it_likes(monkeypatch):
    monkeypatch.setitem(JUDGES, "other", lambda line, text: {"score": float(len(text))})
    assert function_scorer("other", PROMPTS)(EPISODES) == [3.0, 1.0, 0.0]


def test_a_judge_that_fails_names_the_row(monkeypatch):
    def judge(row, completion):
        raise KeyError("answer")

    monkeypatch.setitem(JUDGES, "broken", judge)
    with pytest.raises(AlignError, match="row 3"):
        function_scorer("broken", PROMPTS)(EPISODES)


def test_a_name_that_nobody_registered():
    with pytest.raises(AlignError, match="no reward function or judge is called `containz`"):
        function_scorer("containz", PROMPTS)


def test_scores_are_summed_with_their_weights():
    scorers = {
        "one": (lambda episodes: [1.0, 2.0, 3.0], 0.5),
        "two": (lambda episodes: [10.0, 0.0, -10.0], -1.0),
    }
    assert weighted(scorers)(EPISODES) == [-9.5, 1.0, 11.5]


# --- code from a file ------------------------------------------------------------------------


@pytest.fixture
def code(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "def count(prompts, completions, **columns):\n    return [t.count('a') for t in completions]\n"
        "def judge(row, completion):\n    return {'score': 2.0}\nnothing = 3\n"
    )
    return file


def test_code_from_a_file_runs_only_where_it_was_allowed(code, monkeypatch):
    for value in (None, "", "0", "true"):
        if value is not None:
            monkeypatch.setenv(scoring.ALLOW_CODE, value)
        with pytest.raises(AlignError, match="nobody allowed") as error:
            function_scorer(f"{code}:count", PROMPTS)
        assert "--allow-code" in str(error.value)
    monkeypatch.setenv(scoring.ALLOW_CODE, "1")
    assert function_scorer(f"{code}:count", PROMPTS)(EPISODES) == [1.0, 1.0, 0.0]
    assert function_scorer(f"{code}:judge", PROMPTS)(EPISODES) == [2.0, 2.0, 2.0]


def test_files_that_do_not_do(code, tmp_path, monkeypatch):
    monkeypatch.setenv(scoring.ALLOW_CODE, "1")
    (tmp_path / "broken.py").write_text("import nothing_like_this\n")
    for name, message in (
        (f"{tmp_path}/absent.py:count", "no such file"),
        (f"{code}:absent", "has no function `absent`"),
        (f"{code}:nothing", "has no function `nothing`"),
        (f"{tmp_path}/broken.py:count", "cannot be imported: ModuleNotFoundError"),
    ):
        with pytest.raises(AlignError, match=message):
            function_scorer(name, PROMPTS)


# --- reward models ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_model(tokenizer, tmp_path_factory):
    """A full reward model; `other` has its vocabulary in another order, `bare` no chat template."""
    import json

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.5,
    )
    model = LlamaForSequenceClassification(config)
    folders = {}
    for name in ("same", "other", "bare"):
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
        if name == "same":
            continue
        file = folders[name] / "tokenizer.json"
        content = json.loads(file.read_text())
        vocabulary = content["model"]["vocab"]
        letters = {"a": vocabulary["b"], "b": vocabulary["a"]}
        vocabulary.update(letters)
        file.write_text(json.dumps(content))
        if name == "bare":  # nor the tokens of the shipped template
            (folders[name] / "chat_template.jinja").unlink()
            for file in folders[name].glob("tokenizer*.json"):
                file.write_text(file.read_text().replace("<|start_header_id|>", "<|header|>"))
    return folders


CHAT = [{"role": "user", "content": "a bad cab"}]


def asked(tokenizer, answer="abba", *, ended=True):
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    prompt = Prompt(0, ids, {"prompt": CHAT})
    tokens = tokenizer.encode(answer, add_special_tokens=False)
    stop = [tokenizer.convert_tokens_to_ids("<|eot_id|>")] if ended else []
    return prompt, Episode(0, ids, [*tokens, *stop], ended, answer)


def whole(tokenizer):
    """The chat with its answer as training rows have it: closed by the end of turn."""
    chat = [*CHAT, {"role": "assistant", "content": "abba"}]
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    return ids[: len(ids) - ids[::-1].index(end)]


@pytest.mark.parametrize("name", ["same", "other"])
@pytest.mark.parametrize("ended", [True, False])
def test_a_reward_model_reads_the_text_through_its_own_tokenizer(
    reward_model, tokenizer, name, ended
):
    prompt, answer = asked(tokenizer, ended=ended)
    found = reward_model_scorer(str(reward_model[name]), [prompt], tokenizer, 4)([answer])
    model, own = load_reward_model(str(reward_model[name]))
    ids = torch.tensor([whole(own)])
    wanted = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item()
    assert found == pytest.approx([wanted], abs=1e-5)


def test_the_two_tokenizers_of_this_test_do_differ(reward_model, tokenizer):
    other = PreTrainedTokenizerFast.from_pretrained(reward_model["other"])
    assert other.encode("ab") != tokenizer.encode("ab")


def test_a_reward_model_without_a_chat_template_cannot_read_chats(reward_model, tokenizer):
    prompt, answer = asked(tokenizer)
    with pytest.raises(AlignError, match="template"):
        reward_model_scorer(str(reward_model["bare"]), [prompt], tokenizer, 4)([answer])


def test_a_policy_is_no_reward_model(llama, tokenizer):
    with pytest.raises(AlignError, match="is a policy"):
        reward_model_scorer(str(llama), PROMPTS, tokenizer, 4)
