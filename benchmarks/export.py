"""Do other programs read what `align export` writes, and answer as align does?

    python benchmarks/export.py RUN --prompts tiny-world --split test \
        --llama-cpp llama.cpp --packages FOLDER --transformers4 FOLDER --go go

- llama.cpp: its own converter writes the GGUF file, its server (through the package `xllamacpp`)
  answers the prompts with the chat template in the file. Greedy answers are compared as texts.
- transformers 4: loads the folder for vLLM, and the run's own artifact beside it.
- Go: its `text/template`, which Ollama uses, renders chats with the Modelfile's template; compared
  with the chat template's own text.

`--packages` is a folder with xllamacpp and the converter's needs, `--transformers4` one with
transformers 4 (`pip install --no-deps --target FOLDER ...`). What is not given is left out. The
tokenizer of the tiny model is none that the converter knows: its check of known tokenizers is
answered with `llama-bpe`, whose pattern it has but for groups of digits.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
TOKENS = 64

CONVERTER = """
import sys
sys.path[:0] = [{checkout!r}, {checkout!r} + "/gguf-py"]
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "llama-bpe"
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""

LLAMA_CPP = """
import json, sys
from importlib.metadata import version
import xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path, settings.n_ctx, settings.n_parallel = sys.argv[1], 512, 1
settings.use_jinja, settings.warmup, settings.cpuparams.n_threads = True, False, 1
server = xllamacpp.Server(settings)
found = []
for prompt in json.load(open(sys.argv[2])):
    asked = {"messages": prompt, "temperature": 0, "max_tokens": int(sys.argv[3])}
    answer = server.handle_chat_completions(asked)
    answer = json.loads(answer) if isinstance(answer, str) else answer
    found.append(answer["choices"][0]["message"]["content"].strip())
print(json.dumps({"version": "xllamacpp " + version("xllamacpp"), "answers": found}))
"""

TRANSFORMERS = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
found = []
for prompt in json.load(open(sys.argv[2])):
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=int(sys.argv[3]), do_sample=False
    )
    found.append(tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True).strip())
print(json.dumps({"version": transformers.__version__, "answers": found}))
"""

GO = """
package main

import (
	"encoding/json"
	"os"
	"runtime"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

func main() {
	var cases []struct {
		Template string
		Messages []*message
	}
	content, _ := os.ReadFile(os.Args[1])
	if err := json.Unmarshal(content, &cases); err != nil {
		panic(err)
	}
	found := []string{}
	for _, item := range cases {
		var system []string
		for _, one := range item.Messages {
			if one.Role == "system" {
				system = append(system, one.Content)
			}
		}
		parsed := template.Must(template.New("").Option("missingkey=zero").Parse(item.Template))
		var out strings.Builder
		values := map[string]any{"System": strings.Join(system, "\\n\\n"), "Messages": item.Messages}
		if err := parsed.Execute(&out, values); err != nil {
			panic(err)
		}
		found = append(found, out.String())
	}
	done := map[string]any{"version": runtime.Version(), "texts": found}
	if err := json.NewEncoder(os.Stdout).Encode(done); err != nil {
		panic(err)
	}
}
"""


def call(words: Sequence[str], *, path: Sequence[str] = (), **more: str) -> str:
    """Standard output of a program; its last line of error where it fails."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": "1",
        **more,
    }
    ran = subprocess.run(words, capture_output=True, text=True, env=environment)
    if ran.returncode:
        raise RuntimeError((ran.stderr.strip().splitlines() or ["no message"])[-1])
    return ran.stdout


def export(run: str, form: str, folder: Path, *more: str, path: Sequence[str] = ()) -> None:
    words = [sys.executable, "-m", "align", "export", run, "--format", form]
    call([*words, "--output", str(folder), "--name", "tiny", *more], path=[str(ROOT), *path])


def equal(found: Sequence[str], wanted: Sequence[str]) -> str:
    same = sum(one == other for one, other in zip(found, wanted, strict=True))
    return f"{same} of {len(wanted)}"


def asked_and_answered(options: argparse.Namespace, scratch: Path) -> tuple[list[Any], list[str]]:
    """The prompts and align's own greedy answers."""
    out = scratch / "answers.jsonl"
    words = [sys.executable, "-m", "align", "compare", options.run, options.run]
    words += ["--prompts", options.prompts, "--split", options.split, "--output", str(out)]
    words += ["--max-new-tokens", str(TOKENS), "--max-samples", str(options.rows)]
    call(words, path=[str(ROOT)])
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return [row["prompt"] for row in rows], [row["a"]["answer"] for row in rows]


def llama_cpp(options: argparse.Namespace, scratch: Path, prompts: Path) -> dict[str, Any]:
    checkout = str(Path(options.llama_cpp).resolve())
    wrapper = scratch / "convert_hf_to_gguf.py"
    wrapper.write_text(CONVERTER.format(checkout=checkout), encoding="utf-8")
    folder = scratch / "gguf"
    # float32 on both sides: what is compared is the way, not rounding.
    more = ("--dtype", "float32", "--llama-cpp", str(wrapper))
    export(options.run, "gguf", folder, *more, path=[options.packages])
    script = scratch / "server.py"
    script.write_text(LLAMA_CPP, encoding="utf-8")
    words = [sys.executable, str(script), str(folder / "tiny-f32.gguf"), str(prompts), str(TOKENS)]
    out = call(words, path=[options.packages])
    found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return found


def transformers4(options: argparse.Namespace, folder: Path, prompts: Path) -> dict[str, Any]:
    script = prompts.with_name("transformers4.py")
    script.write_text(TRANSFORMERS, encoding="utf-8")
    words = [sys.executable, str(script), str(folder), str(prompts), str(TOKENS)]
    out = call(words, path=[options.transformers4])
    found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return found


def go_templates(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Chats of one to five turns, with and without a system text, in every shipped template."""
    from transformers import AutoTokenizer

    from align.hub.ollama import find_pieces, go_template
    from align.models.tokenizer import TEMPLATE_TOKENS, render_text, shipped_template

    tokenizer = AutoTokenizer.from_pretrained(scratch / "vllm")
    texts = ["Hi", "Hello.", 'A """ {{ .X }} b', "two\nlines", "Bye"]
    turns = [{"role": ("user", "assistant")[n % 2], "content": t} for n, t in enumerate(texts)]
    cases, wanted = [], []
    for name in TEMPLATE_TOKENS:
        tokenizer.chat_template = shipped_template(name)
        template = go_template(find_pieces(tokenizer))
        for count in (1, 3, 5):
            for system in ([], [{"role": "system", "content": "Be brief."}]):
                chat = [*system, *turns[:count]]
                text = render_text(tokenizer, [chat], add_generation_prompt=True)[0]
                wanted.append(text.removeprefix(tokenizer.bos_token))
                messages = [{"Role": t["role"], "Content": t["content"]} for t in chat]
                cases.append({"Template": template, "Messages": messages})
    (scratch / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    (scratch / "main.go").write_text(GO, encoding="utf-8")
    words = [options.go, "run", str(scratch / "main.go"), str(scratch / "cases.json")]
    found = json.loads(call(words, GOTOOLCHAIN="local"))
    return {"version": found["version"], "equal": equal(found["texts"], wanted)}


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    prompts, answers = asked_and_answered(options, scratch)
    file = scratch / "prompts.json"
    file.write_text(json.dumps(prompts), encoding="utf-8")
    export(options.run, "vllm", scratch / "vllm", "--dtype", "float32")
    results: dict[str, Any] = {}
    if options.llama_cpp:
        found = llama_cpp(options, scratch, file)
        results["llama.cpp"] = {
            "version": found["version"],
            "equal": equal(found["answers"], answers),
        }
    if options.transformers4:
        found = transformers4(options, scratch / "vllm", file)
        results["transformers 4"] = {
            "version": found["version"],
            "equal": equal(found["answers"], answers),
        }
        try:
            transformers4(options, Path(options.run) / "artifact", file)
            results["transformers 4, not exported"] = {
                "version": found["version"],
                "equal": "loads",
            }
        except RuntimeError as error:
            said = str(error).partition("\n")[0]
            results["transformers 4, not exported"] = {"version": found["version"], "equal": said}
    if options.go:
        results["Go text/template"] = go_templates(options, scratch)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run")
    parser.add_argument("--prompts", default="tiny-world")
    parser.add_argument("--split", default="test")
    parser.add_argument("--rows", type=int, default=100)
    for name in ("llama-cpp", "packages", "transformers4", "go"):
        parser.add_argument(f"--{name}", default="")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        results = measure(options, Path(folder))
    lines = ["# What other programs make of an export", ""]
    lines += [
        f"`benchmarks/export.py` on the tiny model ({options.rows} prompts, greedy, float32).",
        "",
    ]
    lines += ["| reader | version | answers (texts) equal to align's |", "| --- | --- | --- |"]
    lines += [f"| {name} | {row['version']} | {row['equal']} |" for name, row in results.items()]
    text = "\n".join(lines) + "\n"
    (HERE / "results" / "export.md").write_text(text, encoding="utf-8")
    (HERE / "results" / "export.json").write_text(json.dumps(results, indent=2) + "\n")
    print(text)


if __name__ == "__main__":
    main()
