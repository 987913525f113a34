"""Tiny stand-ins, made on the spot: a byte-level tokenizer with Llama 3's control tokens, random models."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
from hypothesis import settings

# `make test` draws the same examples each time, so that it says something of the tree it runs on and nothing of luck;
# `make explore` draws new ones.
settings.register_profile("repeatable", derandomize=True, database=None)
settings.register_profile("explore", derandomize=False, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# A job in the background (`make test &`, nohup) begins with Ctrl-C ignored, and tests send it to themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)

CONTROL_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
]


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE without merges, Llama 3's control tokens and the shipped chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from align.models.tokenizer import shipped_template

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(CONTROL_TOKENS + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=CONTROL_TOKENS[0],
        eos_token=CONTROL_TOKENS[1],
        pad_token=CONTROL_TOKENS[5],
        additional_special_tokens=CONTROL_TOKENS[2:5],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    made.chat_template = shipped_template("llama3")
    return made


@pytest.fixture(scope="session")
def make_llama(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a random two-layer Llama with its tokenizer into a folder of its own."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(seed: int = 0, *, tie: bool = True, layers: int = 2) -> Path:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            rope_theta=500000.0,
            tie_word_embeddings=tie,
            initializer_range=0.2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        folder = tmp_path_factory.mktemp("llama")
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def llama(make_llama: Callable[..., Path]) -> Path:
    """One random Llama that tests share and never write to."""
    return make_llama()


@pytest.fixture(autouse=True)
def console_of_its_own() -> None:
    """A console remembers COLUMNS and NO_COLOR from when it was made: each test makes its own."""
    from align.report.terminal import console

    console.cache_clear()
