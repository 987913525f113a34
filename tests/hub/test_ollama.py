"""Go templates give what the chat template gives, by a small reader of Go's template language."""

import re
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.errors import AlignError
from align.hub.ollama import find_pieces, go_template, modelfile
from align.models.portable import without_markers
from align.models.tokenizer import render_text, shipped_template

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nA default.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM_IN_THE_USER_S_TURN = (
    "{% set s = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{{ bos_token }}{% for m in (messages[1:] if s else messages) %}"
    "{{ '<turn>' + m.role + '\n' + (s if loop.first else '') + m.content + '</turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<turn>assistant\n' }}{% endif %}"
)
BRACES = (
    "{% for m in messages %}{{ '{{' + m.role + '}}' + m.content + '{{end}}' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '{{assistant}}' }}{% endif %}"
)
TEMPLATES = {
    **{name: shipped_template(name) for name in ("llama3", "llama3.1", "llama3.2")},
    "chatml": CHATML,
    "system in the user's turn": SYSTEM_IN_THE_USER_S_TURN,
    "braces": BRACES,
}


# --- enough of Go's text/template -----------------------------------------------------------


def parse(source: str) -> list:
    """Text and actions as a tree: strings, ("if", condition, then, else), ("range", body), ..."""
    tokens = re.split(r"(\{\{.*?\}\})", source)
    place = count()

    def block(ends: tuple[str, ...]) -> tuple[list, str]:
        nodes: list = []
        while (at := next(place)) < len(tokens):
            token = tokens[at]
            if not token.startswith("{{"):
                nodes.append(token)
                continue
            action = token[2:-2].strip()
            if action in ends or any(action.startswith(f"{end} ") for end in ends):
                return nodes, action
            if action.startswith("if "):
                nodes.append(branch(action.removeprefix("if ")))
            elif action.startswith("range "):
                nodes.append(("range", block(("end",))[0]))
            else:
                nodes.append(("do", action))
        return nodes, ""

    def branch(condition: str) -> tuple:
        then, end = block(("else", "end"))
        if end.startswith("else if "):
            return "if", condition, then, [branch(end.removeprefix("else if "))]
        return "if", condition, then, block(("end",))[0] if end == "else" else []

    return block(())[0]


def execute(nodes: list, system: str, messages: list[dict], scope: dict | None = None) -> str:
    out, scope = "", {} if scope is None else scope
    values = {"$.System": system, **scope}
    for node in nodes:
        values |= scope
        if isinstance(node, str):
            out += node
        elif node[0] == "range":
            for number, message in enumerate(messages):
                scope |= {".Role": message["role"], ".Content": message["content"], "$i": number}
                out += execute(node[1], system, messages, scope)
        elif node[0] == "if":
            taken = node[2] if holds(node[1], values) else node[3]
            out += execute(taken, system, messages, scope)
        elif assigned := re.fullmatch(r"(\$\w+) :?= (.*)", node[1]):
            name, value = assigned.groups()
            if value == "eq (len (slice $.Messages $i)) 1":
                scope[name] = len(messages[values["$i"] :]) == 1
            else:
                scope[name] = {"true": True, "false": False}[value]
        elif node[1].startswith('"'):
            out += node[1].strip('"')
        else:
            out += values[node[1]]
    return out


def holds(condition: str, values: dict) -> bool:
    if condition.startswith("not "):
        return not holds(condition.removeprefix("not "), values)
    if compared := re.fullmatch(r'eq (\.\w+) "(\w+)"', condition):
        return values[compared[1]] == compared[2]
    return bool(values[condition])


@pytest.fixture
def speaking(tokenizer):
    """The tokenizer with another chat template."""
    kept = tokenizer.chat_template

    def use(template: str):
        tokenizer.chat_template = template
        return tokenizer

    yield use
    tokenizer.chat_template = kept


TURNS = st.lists(st.sampled_from(["Hi", "A {{ .X }} b", 'q " """', "two\nlines", "</turn>"]))


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_go_template_gives_the_chats_of_the_template(speaking, name):
    tokenizer = speaking(TEMPLATES[name])
    nodes = parse(go_template(find_pieces(tokenizer)))

    @given(TURNS.filter(lambda texts: len(texts) % 2 == 1), st.sampled_from(["", "Be brief."]))
    def check(texts, system):
        roles = ("user", "assistant")
        chat = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
        head = [{"role": "system", "content": system}] if system else []
        want = render_text(tokenizer, [head + chat], add_generation_prompt=True)[0]
        want = want.removeprefix(tokenizer.bos_token)
        assert execute(nodes, system, head + chat) == want

    check()


def test_an_answer_that_is_begun_is_left_open(speaking):
    nodes = parse(go_template(find_pieces(speaking(TEMPLATES["llama3"]))))
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I th"}]
    assert execute(nodes, "", chat).endswith("<|end_header_id|>\n\nI th")


def test_the_system_text_is_written_once_where_turns_begin_alike(speaking):
    text = go_template(find_pieces(speaking(TEMPLATES["llama3"])))
    assert "$first" not in text
    assert text.count("<|start_header_id|>user") == 1
    assert "$first" in go_template(find_pieces(speaking(SYSTEM_IN_THE_USER_S_TURN)))


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}",
        "{{ messages[-1].content }}",
        "{{ raise_exception('no') }}",
    ],
    ids=["counts turns", "shows the last turn only", "refuses"],
)
def test_a_template_that_is_not_made_of_pieces_is_refused(speaking, template):
    with pytest.raises(AlignError):
        find_pieces(speaking(template))


@pytest.mark.parametrize(
    ("stops", "system", "words"),
    [
        ([], 'a """', 'the system text holds """'),
        ([], 'Say "hi"', "the system text ends in a quote"),
        (['x"\nFROM /etc'], None, "a stop cannot stand"),
        (["\n"], None, "a stop cannot stand"),
    ],
)
def test_a_modelfile_cannot_hold_every_text(speaking, stops, system, words):
    pieces = find_pieces(speaking(TEMPLATES["llama3"]))
    with pytest.raises(AlignError, match=words):
        modelfile(pieces, stops, system)


def test_templates_without_markers_render_alike(speaking):
    marked = TEMPLATES["llama3.1"]
    bare = without_markers(marked)
    assert "generation" in marked
    assert not re.search(r"\{%.*(end)?generation ?-?%\}", bare)
    chat = [
        {"role": "user", "content": " Q "},
        {"role": "assistant", "content": " A \n"},
        {"role": "user", "content": "Q"},
    ]
    first = render_text(speaking(marked), [chat], add_generation_prompt=True)
    assert first == render_text(speaking(bare), [chat], add_generation_prompt=True)
    assert without_markers("a {%- generation -%} b {% endgeneration %}") == "a {#- -#} b {# #}"
