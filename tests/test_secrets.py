"""What counts as a secret, and what does not."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.secrets import HIDDEN, _stored, holds_secret, own_secrets, scrub, scrubbed

TOKEN = "hf_abcdefghijklmnopqrstuv"


@pytest.mark.parametrize(
    "text",
    [
        TOKEN,
        "api_org_abcdefghijklmnopqrstuv",
        "ghp_abcdefghijklmnopqrstuv",
        "github_pat_11ABCDEFG0abcdefghijklmn",
        "sk-proj-Abcdefghijklmnop0123",
        "AKIAABCDEFGHIJKLMNOP",
    ],
)
def test_keys_are_known_by_their_form(text):
    assert scrub(f"with {text}, and more") == f"with {HIDDEN}, and more"
    assert holds_secret(f"with {text}")


@pytest.mark.parametrize(
    "text",
    [
        "runs/task-specific-things/artifact",
        "hf_checkpoints/llama",
        "eos_token=<|eot_id|> max_new_tokens=5",
        "0123456789abcdef0123456789abcdef01234567",
        "https://huggingface.co/org/name?x=1",
        "me@host:folder",
    ],
)
def test_what_only_resembles_one_stays(text):
    assert scrub(text) == text
    assert not holds_secret(text)


@pytest.mark.parametrize(
    "name", ["WANDB_API_KEY", "MY_TOKEN", "DB_PASSWORD", "AWS_SECRET_ACCESS_KEY"]
)
def test_values_of_variables_that_are_named_so_are_secrets(monkeypatch, name):
    monkeypatch.setenv(name, "correct-horse-battery")
    assert scrub("a correct-horse-battery staple") == f"a {HIDDEN} staple"
    assert holds_secret("correct-horse-battery")


@pytest.mark.parametrize("name", ["HF_TOKEN_PATH", "PATH", "TOKENIZERS_PARALLELISM", "PATTERN"])
def test_other_variables_are_not(monkeypatch, name):
    monkeypatch.setenv(name, "correct-horse-battery")
    assert "correct-horse-battery" not in own_secrets()


def test_a_short_value_may_be_any_word(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "llama")
    assert scrub("llama3-8b/sft of llama") == "llama3-8b/sft of llama"


def test_the_stored_token_is_one(monkeypatch, tmp_path):
    (tmp_path / "token").write_text("a-token-of-another-form\n")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    _stored.cache_clear()
    assert scrub("x a-token-of-another-form") == f"x {HIDDEN}"
    _stored.cache_clear()


def test_passwords_of_addresses():
    text = "fetch https://me:s3cret@host/x.git, git+ssh://u:p@h"
    assert scrub(text) == f"fetch https://me:{HIDDEN}@host/x.git, git+ssh://u:{HIDDEN}@h"


def test_a_long_word_is_read_once():
    """A model may write anything: 20,000 letters took half a minute when each began a search."""
    begun = time.monotonic()
    for text in ("a" * 100_000 + "=", "-" * 100_000 + "=", "://a:" * 20_000):
        assert scrub(text) == text
    assert time.monotonic() - begun < 2


def test_plain_data_keeps_its_form():
    value = {"hub_token": "anything", "a": [TOKEN, 1, None, {"api_key": None, "b": True}], "n": 0.5}
    assert scrubbed(value) == {
        "hub_token": HIDDEN,
        "a": [HIDDEN, 1, None, {"api_key": None, "b": True}],
        "n": 0.5,
    }


@given(st.text(max_size=60))
def test_taking_out_twice_is_taking_out_once(text):
    assert scrub(scrub(text)) == scrub(text)


@given(st.text(alphabet="ab =:/@?", max_size=20), st.text(alphabet="xy .,;", max_size=20))
def test_a_token_is_found_wherever_it_stands(before, after):
    assert TOKEN not in scrub(f"{before} {TOKEN} {after}")
