"""Ask a model one question, or hold a conversation on stdin."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO

from shardmerge.errors import ConfigError, ShardmergeError
from shardmerge.inference.chat.model import Chat
from shardmerge.inference.chat.terminal import History, Terminal
from shardmerge.inference.hf import Message
from shardmerge.system.terminal_text import one_line, shown, shown_answer

DEFAULT_MAX_NEW_TOKENS = 512

HELP = """\
/help         this text
/reset        forget the conversation
/system TEXT  forget the conversation, and begin the next with TEXT as the system message
/exit, /quit  leave, as Ctrl-D does
//TEXT        send /TEXT to the model
Ctrl-C stops an answer. The arrow keys bring back earlier lines."""

#: Commands, and whether text may follow.
_COMMANDS = {"/help": False, "/reset": False, "/system": True, "/exit": False, "/quit": False}


def once(
    chat: Chat,
    prompt: str,
    *,
    system: str | None = None,
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    quiet: bool = False,
) -> tuple[str, str]:
    """Write the answer to ``prompt`` to stdout, unless ``quiet``. Returns prompt and answer.

    The prompt ``-`` is read from stdin.
    """
    try:
        text = sys.stdin.read().rstrip("\n") if prompt == "-" else prompt
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt on stdin is not text: {error}") from error
    if not text.strip():
        raise ConfigError("the prompt is empty")
    history = _opening(system)
    muted = contextlib.nullcontext() if quiet or not sys.stdout.isatty() else Terminal(sys.stdin).muted()
    with muted:
        _exchange(chat, history, text, max_new_tokens, (lambda piece: None) if quiet else _say)
    return text, history[-1]["content"] if history[-1:] and history[-1]["role"] == "assistant" else ""


def loop(chat: Chat, *, system: str | None = None, max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS) -> None:
    """Answer the lines of stdin until it ends or a line is ``/exit`` or ``/quit``.

    On a terminal Ctrl-C stops the answer or drops the line, and the conversation goes on after an error; elsewhere both
    end it. Text typed during an answer is not shown: with line editing it becomes the next line, without it is dropped.
    """
    talk = _Conversation(chat, system, max_new_tokens)
    survived: tuple[type[BaseException], ...] = ()
    if talk.interactive:
        survived = (KeyboardInterrupt, ShardmergeError, UnicodeError)
        _notice("/help lists the commands, /exit or Ctrl-D leaves, Ctrl-C stops an answer")
    try:
        while True:
            try:
                if not talk.step():
                    return
            except survived as error:
                _notice("\n(stopped)" if isinstance(error, KeyboardInterrupt) else f"error: {one_line(str(error))}")
    finally:
        talk.terminal.restore()


@dataclass
class _Conversation:
    chat: Chat
    system: str | None
    max_new_tokens: int
    history: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.history = _opening(self.system)
        self.terminal = Terminal(sys.stdin)
        self.interactive = sys.stdin.isatty()
        # readline writes the prompt itself, to stdout, so that it knows the cursor's position.
        self.editing = self.interactive and sys.stdout.isatty()
        self.lines = History() if self.editing else None

    def step(self) -> bool:
        """Read a line and act on it. Returns False for the last."""
        try:
            line = self._line()
        except EOFError:
            if self.interactive:
                _notice("")  # Ctrl-D leaves the cursor after the prompt
            return False
        said = command(line)
        if said is not None:
            return self._obey(*said)
        if line.strip():
            with self.terminal.muted(forget=not self.editing):
                _exchange(self.chat, self.history, for_model(line), self.max_new_tokens, _say)
        return True

    def _line(self) -> str:
        self.terminal.restore()  # needed where Ctrl-C came just after an answer
        if self.interactive and not self.editing:
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = input("> " if self.editing else "")
        except UnicodeDecodeError as error:
            raise ConfigError(f"a line of the conversation is not text: {error}") from error
        if self.lines is not None:
            self.lines.keep()
        return line

    def _obey(self, name: str, text: str) -> bool:
        if name == "/help":
            _notice(HELP)
        elif name == "/reset":
            self.history = _opening(self.system)
            _notice("the conversation is forgotten")
        elif name == "/system":
            self._set_system(text)
        return name not in ("/exit", "/quit")

    def _set_system(self, text: str) -> None:
        if not text:
            _notice(f"the system message: {self.system or 'nothing'}")
            return
        self.system = text
        self.history = _opening(text)
        _notice("the conversation is forgotten; this is the system message of the next")


def _exchange(
    chat: Chat, history: list[Message], prompt: str, max_new_tokens: int, stream_to: Callable[[str], object]
) -> None:
    """Ask a question. It is added to ``history`` with its answer, as far as that came."""
    asked = {"role": "user", "content": prompt}
    heard: list[str] = []

    def hear(piece: str) -> None:
        heard.append(piece)
        stream_to(piece)

    try:
        chat.answer([*history, asked], max_new_tokens, hear)
    finally:
        if heard:  # a template may not accept an empty answer
            stream_to("\n")
            history += [asked, {"role": "assistant", "content": "".join(heard)}]


def _opening(system: str | None) -> list[Message]:
    return [{"role": "system", "content": system}] if system else []


def _say(piece: str) -> None:
    _write(sys.stdout, shown_answer(piece) if sys.stdout.isatty() else piece)


def _notice(text: str) -> None:
    _write(sys.stderr, shown(text) + "\n")


def _write(stream: TextIO, text: str) -> None:
    """Print; characters that the stream's encoding lacks, such as lone surrogates, are escaped."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), end="", file=stream, flush=True)


def command(line: str) -> tuple[str, str] | None:
    """The command in a line and the text after it; None where the line is for the model.

    `ConfigError` for an unknown command, which may be a mistyped one.
    """
    text = line.strip()
    if not text.startswith("/") or text.startswith("//"):
        return None
    name, _, rest = text.partition(" ")
    rest = rest.strip()
    if name not in _COMMANDS:
        near = difflib.get_close_matches(name.lower(), _COMMANDS, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"there is no command {name}; {meant}/help lists them, and a line that begins with // goes to the model "
            "with one slash"
        )
    if rest and not _COMMANDS[name]:
        raise ConfigError(f"{name} takes no text after it; nothing was done")
    return name, rest


def for_model(line: str) -> str:
    """The text that the model gets of a line that is not a command."""
    return line.replace("//", "/", 1) if line.lstrip().startswith("//") else line
