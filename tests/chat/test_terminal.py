"""`align chat` in a real terminal (a pty) and through a real pipe."""

import os
import pty
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).parent.parent.parent
ALIGN = [sys.executable, "-m", "align", "chat"]


def environment(**more: str) -> dict[str, str]:
    own = {"PYTHONPATH": str(CHECKOUT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own, "TERM": "xterm", **more}


@pytest.fixture(scope="module")
def slow_model(llama: Path, tmp_path_factory) -> Path:
    """Deep enough that an answer takes a while."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=60,
        num_attention_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("slow")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Terminal:
    """A program in a terminal of 120 columns."""

    def __init__(self, *words: str, cwd: Path) -> None:
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (30, 120))
        self.process = subprocess.Popen(
            [*ALIGN, *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=cwd,
            env=environment(COLUMNS="120"),
            start_new_session=True,
            preexec_fn=lambda: _own_terminal(slave),
        )
        os.close(slave)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, text: str, seconds: float = 120) -> str:
        """What was shown up to and with `text`, which is then forgotten."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"{text!r} never came: {self.seen[-2000:]!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode(errors="replace")
                except OSError:  # the program has left
                    assert text in self.seen, self.seen[-2000:]
        shown, _, self.seen = self.seen.partition(text)
        return shown


def _own_terminal(slave: int) -> None:
    import fcntl

    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(slow_model, tmp_path):
    # Greedy, it goes round in a circle: a drawn answer might end before Ctrl-C.
    words = ("--max-new-tokens", "2000", "--temperature", "0")
    terminal = Terminal(str(slow_model), *words, cwd=tmp_path)
    terminal.wait_for("> ")
    terminal.type("Hello\n")
    terminal.wait_for("Hello")
    time.sleep(1.5)
    assert terminal.process.poll() is None
    terminal.type("\x03")
    terminal.wait_for("stopped by Ctrl-C")
    terminal.wait_for("> ")
    terminal.type("/save chat.jsonl\n")
    terminal.wait_for("saved: chat.jsonl (1 turn)")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0
    assert (tmp_path / "chat.jsonl").is_file()


def test_two_models_side_by_side(llama, tmp_path):
    terminal = Terminal(
        str(llama), "--against", str(llama), "--max-new-tokens", "8", "--seed", "3", cwd=tmp_path
    )
    terminal.wait_for("> ")
    terminal.type("Hello\n")
    shown = terminal.wait_for("\n> ")
    heads = [line for line in shown.splitlines() if "(A)" in line and "(B)" in line]
    assert heads, shown
    terminal.type("/exit\n")
    assert terminal.process.wait(30) == 0


def test_through_a_pipe(llama, tmp_path):
    words = [*ALIGN, str(llama), "--max-new-tokens", "5", "--json"]
    ran = subprocess.run(
        words,
        input="Hello\n\n/undo\nAgain\n",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(),
    )
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert len(lines) == 2
    assert '"user": "Again"' in lines[1]
    ran = subprocess.run(
        words,
        input="//\n/nonsense\n",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(),
    )
    assert ran.returncode == 2
    assert "no such command: /nonsense" in ran.stderr
