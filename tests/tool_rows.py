"""A row with functions, a call and its result, and how Llama 3.1's shipped template writes it."""

from itertools import groupby

SONGS = {
    "type": "function",
    "function": {
        "name": "songs",
        "parameters": {
            "type": "object",
            "properties": {"n": {"type": "integer", "default": None}},
        },
    },
}
WEATHER = {"name": "weather", "parameters": {"city": {"type": "str"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "songs", "arguments": {"n": 3}}}
BARE = {"name": "songs", "arguments": {"n": 3}}
U = {"role": "user", "content": "Songs?"}
ASKS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "songs", "tool_call_id": "c1", "content": '["a", "b"]'}
A = {"role": "assistant", "content": "a and b"}
CHAT = [U, ASKS, RESULT, A]
ROW = {"messages": CHAT, "tools": [SONGS]}

OFFER = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    "These functions can be called. To call one, answer with nothing but JSON of the form "
    '{"type": "function", "name": its name, "parameters": its arguments by name}.\n\n'
    '{"type": "function", "function": {"name": "songs", "parameters": {"type": "object", '
    '"properties": {"n": {"type": "integer", "default": null}}}}}\n\n<|eot_id|>'
    "<|start_header_id|>user<|end_header_id|>\n\nSongs?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
CALLED = '{"type": "function", "name": "songs", "parameters": {"n": 3}}<|eot_id|>'
ANSWERED = (
    '<|start_header_id|>ipython<|end_header_id|>\n\n["a", "b"]<|eot_id|>'
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
WRITTEN = f"{OFFER}[[{CALLED}]]{ANSWERED}[[a and b<|eot_id|>]]"
"""The row as Llama 3.1's shipped template writes it, with [[ ]] around what is in the loss."""


def shown(tokenizer, ids, mask) -> str:
    text = ""
    for on, group in groupby(zip(ids, mask, strict=True), key=lambda pair: bool(pair[1])):
        piece = tokenizer.decode([token for token, _ in group])
        text += f"[[{piece}]]" if on else piece
    return text


def trained(tokenizer, row) -> str:
    return shown(tokenizer, row["input_ids"], [label != -100 for label in row["labels"]])
