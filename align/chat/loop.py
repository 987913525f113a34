"""The chat itself: reads turns and commands, lets the models answer, shows the answers."""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from align.answers import print_problems
from align.chat.screen import Columns, Screen, is_interactive, screen_for
from align.chat.session import Reply, Session, Turn
from align.config.suggest import nearest
from align.errors import AlignError, fail
from align.models.source import find_model, two_names
from align.report.terminal import say

if TYPE_CHECKING:
    from align.chat.speaker import Manner, Speaker

COMMANDS = {
    "/help": "this list",
    "/reset": "forget the chat; the system text stays",
    "/system [TEXT]": "show the system text, or set it (`/system -` for none)",
    "/undo": "take the last turn back",
    "/retry": "answer the last turn once more, with other draws",
    "/save FILE": "write the chat as rows of `messages` (jsonl), never over a file",
    "/exit": "leave, as Ctrl-D does",
}
NOTES = """Ctrl-C stops an answer and keeps the chat. A line that ends in \\ goes on in the next one.
Two slashes begin a turn with one: //etc is /etc."""


class Chat:
    """One or two models, what was said so far, and the commands of a session."""

    def __init__(
        self, speakers: Sequence["Speaker"], session: Session, manner: "Manner", *, as_json: bool
    ) -> None:
        self.speakers, self.session, self.manner = speakers, session, manner
        self.as_json = as_json
        self.interactive = is_interactive() and not as_json

    def run(self) -> None:
        """Talk until the end of the input.

        Raises:
            AlignError: through a pipe, a turn that cannot be asked or a command that cannot be done.
        """
        for number, line in enumerate(self._lines(), 1):
            try:
                if not self.take(line):
                    return
            except AlignError as error:
                if not self.interactive:
                    say(f"line {number} of the input", style="red")
                    raise
                print_problems(error)
            except KeyboardInterrupt:  # between two answers, or before the first token
                if not self.interactive:
                    raise
                say("(stopped; Ctrl-D or /exit leaves)", style="dim")

    def take(self, line: str) -> bool:
        """Do what a line says; False where it says to leave."""
        asked = line.strip()
        if not asked:
            return True
        if any("\ud800" <= char <= "\udfff" for char in asked):
            fail("is not UTF-8 text", where="this turn")
        if asked.startswith("/") and not asked.startswith("//"):
            return self._command(asked)
        self.ask(asked[1:] if asked.startswith("//") else asked)
        return True

    def ask(self, asked: str, tries: int = 1) -> None:
        """Let every model answer a turn.

        Raises:
            AlignError: for one of them there is no room for it; none is asked then.
        """
        names = self.session.names
        prompts = [s.prompt(self.session.messages(s.name, asked)) for s in self.speakers]
        turn = Turn(asked, tries=tries)
        screen = screen_for(names, as_json=self.as_json)
        place = (len(self.session.turns), tries - 1)
        try:
            for speaker, ids in zip(self.speakers, prompts, strict=True):
                screen.begin(speaker.name)
                reply = self._answered(speaker, ids, place, screen)
                turn.replies[speaker.name] = reply
                screen.end(reply)
        except BaseException:
            if isinstance(screen, Columns):
                screen.close()
            raise
        screen.finish(asked, turn.replies)
        if any(reply.text for reply in turn.replies.values()):
            self.session.turns.append(turn)

    def _answered(
        self, speaker: "Speaker", ids: list[int], place: tuple[int, int], screen: Screen
    ) -> Reply:
        reply = speaker.answer(ids, self.manner, place=place, on_text=screen.piece)
        if reply.end == "interrupted" and not self.interactive:
            raise KeyboardInterrupt
        return reply

    def _lines(self) -> Iterator[str]:
        if not self.interactive:
            try:
                for line in sys.stdin:  # not `yield from`, which would close it in the end
                    yield line
            except UnicodeDecodeError as error:
                fail(f"is not UTF-8 text ({error})", where="the input")
            return
        _line_editing()
        while True:
            try:
                line = input("> ")
                while line.endswith("\\"):
                    line = line[:-1] + "\n" + input(". ")
            except KeyboardInterrupt:
                say("\n(Ctrl-D or /exit leaves)", style="dim")
                continue
            except EOFError:
                print()
                return
            yield line

    # --- commands ---------------------------------------------------------------------------

    def _command(self, line: str) -> bool:
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word in ("/exit", "/quit"):
            return False
        actions = {
            "/help": self._help,
            "/reset": self._reset,
            "/system": self._system,
            "/undo": self._undo,
            "/retry": self._retry,
            "/save": self._save,
        }
        if word not in actions:
            near = nearest(word, [*actions, "/exit"])
            hint = f"did you mean `{near}`?" if near else "`/help` lists the commands"
            fail(f"no such command: {word}", hint=f"{hint}; `//` begins a turn with a slash")
        actions[word](rest)
        return True

    def _help(self, _: str) -> None:
        for command, does in COMMANDS.items():
            say(f"{command:<15} {does}")
        say(NOTES, style="dim")

    def _reset(self, _: str) -> None:
        self.session.reset()
        self._say("the chat begins anew")

    def _system(self, text: str) -> None:
        if not text:
            for name, system in self.session.systems.items():
                self._say(f"{name}: {system or 'no system text'}")
            return
        kept = self.session.systems
        self.session.systems = dict.fromkeys(kept, None if text == "-" else text)
        try:  # a template may know no system turn
            for speaker in self.speakers:
                speaker.prompt(self.session.messages(speaker.name, "?"))
        except AlignError:
            self.session.systems = kept
            raise
        self._say("no system text" if text == "-" else "the system text is set, for the whole chat")

    def _undo(self, _: str) -> None:
        turn = self.session.undo()
        if turn is None:
            fail("there is no turn to take back", where="/undo")
        self._say(f"taken back: {turn.user}")

    def _retry(self, _: str) -> None:
        turn = self.session.undo()
        if turn is None:
            fail("there is no turn to answer again", where="/retry")
        if self.manner.temperature == 0:
            self._say("at --temperature 0 the answer is the same every time")
        before = len(self.session.turns)
        try:
            self.ask(turn.user, turn.tries + 1)
        finally:
            if len(self.session.turns) == before:  # no new answer: the old one stays
                self.session.turns.append(turn)

    def _save(self, name: str) -> None:
        if not name:
            fail("the name of a file is missing", where="/save", hint="as in /save chat.jsonl")
        turns = self.session.save(Path(name))
        self._say(f"saved: {name} ({turns} turn{'s' if turns > 1 else ''})")

    def _say(self, text: str) -> None:
        say(text, style="dim")


def chat(
    model: str,
    against: str | None,
    *,
    manner: "Manner",
    system: str | None = None,
    chat_template: str | None = None,
    in_4bit: bool | None = None,
    as_json: bool = False,
) -> None:
    """Load one model or two and talk to them.

    Args:
        model, against: what `find_model` takes.
        manner: how answers are drawn.
        system: system text of both; each run's own when None, none at all when empty.
        chat_template: shipped template or Jinja file in place of the tokenizers' own.
        in_4bit: quantize the weights; as each run trained when None.
        as_json: one JSON object for every turn.
    """
    from align.chat.speaker import load_speakers

    sources = [find_model(given) for given in (model, against) if given is not None]
    names = two_names(*sources) if len(sources) == 2 else (sources[0].name,)
    for name, source in zip(names, sources, strict=True):
        quantized = source.in_4bit if in_4bit is None else in_4bit
        say(f"{name}: {source.path}{', in 4 bits' if quantized else ''}", style="dim")
    speakers = load_speakers(names, sources, in_4bit=in_4bit, chat_template=chat_template)
    own = dict(zip(names, (source.system_prompt for source in sources), strict=True))
    session = Session(own if system is None else dict.fromkeys(names, system or None))
    talk = Chat(speakers, session, manner, as_json=as_json)
    if talk.interactive:
        _greet(session, manner)
    try:
        talk.run()
    except BrokenPipeError:  # who read the answers has gone (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _greet(session: Session, manner: "Manner") -> None:
    how = f"temperature {manner.temperature:g}, top-p {manner.top_p:g}, seed {manner.seed}"
    say(f"{how}; /help lists the commands, Ctrl-D leaves", style="dim")
    for name, system in session.systems.items():
        if system:
            say(f"{name} has the system text: {system}", style="dim")


def _line_editing() -> None:
    """Arrow keys and history in `input`, where Python was built with readline."""
    try:
        import readline
    except ImportError:
        return
    readline.set_auto_history(True)
