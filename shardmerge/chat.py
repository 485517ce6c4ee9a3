"""Talk to a finished model, to see with one's own eyes what a merge did to it.

Answers are greedy, so that two runs can be compared, and go to stdout; prompts and notices go to stderr. `transformers`
is an extra, imported when it is needed; it pushes tokens into `_Streamer` from the caller's own thread, so that Ctrl-C
is an ordinary ``KeyboardInterrupt`` out of ``generate`` and nothing is left running.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardmerge import hf
from shardmerge.errors import ConfigError, ShardmergeError
from shardmerge.hf import DEFAULT_TEMPLATE, Message

__all__ = ["DEFAULT_MAX_NEW_TOKENS", "DEFAULT_TEMPLATE", "Chat", "Message", "load", "loop", "once"]

DEFAULT_MAX_NEW_TOKENS = 512

#: Lines of history that are kept.
_HISTORY = 1000


@dataclass(frozen=True, slots=True)
class Chat:
    """A model that answers; made by `load`."""

    tokenizer: Any
    model: Any
    #: The plain template in use, which has room for the last prompt only; ``None``: the tokenizer's chat template.
    template: str | None

    def answer(self, messages: Sequence[Message], max_new_tokens: int, stream_to: Callable[[str], object]) -> str:
        """The greedy continuation of ``messages``, the last of which is the user's.

        ``stream_to`` is called with each piece of text as soon as it is certain; the pieces add up to what is returned.
        """
        if max_new_tokens < 1:
            raise ConfigError(f"max new tokens is {max_new_tokens}; expected 1 or more")
        streamer = _Streamer(self._decode, stream_to)
        with hf.quiet():
            encoded = hf.encode(self.tokenizer, self.template, messages)
            inputs = {name: tensor.to(self.model.device) for name, tensor in encoded.items()}
            limits = {"max_new_tokens": max_new_tokens, "eos_token_id": hf.stop_ids(self.model, self.tokenizer)}
            try:
                self.model.generate(**inputs, **limits, **hf.GREEDY, streamer=streamer)
            except IndexError as error:  # learned position embeddings end where the context does
                raise ConfigError("prompt and answer are longer than the model's context") from error
        return streamer.text

    def _decode(self, ids: list[int]) -> str:
        # Clean-up takes back a space that was already streamed ("word ," becomes "word,").
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@dataclass
class _Streamer:
    """What ``generate`` pushes tokens into: the prompt first, then each new token, then ``end``."""

    decode: Callable[[list[int]], str]
    stream_to: Callable[[str], object]
    text: str = ""
    ids: list[int] | None = None

    def put(self, tokens: Any) -> None:
        self.ids = [] if self.ids is None else self.ids + tokens.tolist()
        # A character that lacks some of its bytes decodes to U+FFFD until the next tokens bring them.
        self._emit(self.decode(self.ids).rstrip("\ufffd"))

    def end(self) -> None:
        self._emit(self.decode(self.ids or []))

    def _emit(self, whole: str) -> None:
        piece = whole[len(self.text) :]
        self.text += piece
        if piece:
            self.stream_to(piece)


def load(path: str, template: str | None = None) -> Chat:
    """The model in the directory ``path``, in its stored dtype; never from the network, never running its code.

    ``template`` replaces the tokenizer's chat template; ``\\n`` in it, typed as two characters, is a newline.
    """
    hf.check_template(template)
    hf.check_directory(Path(path))
    tokenizer = hf.load_tokenizer(path)
    return Chat(tokenizer, hf.load_model(path), hf.template_for(tokenizer, template))


def once(
    chat: Chat,
    prompt: str,
    *,
    system: str | None = None,
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    quiet: bool = False,
) -> tuple[str, str]:
    """Write the answer to ``prompt`` to stdout, unless ``quiet``; returns both.

    The prompt ``-`` stands for what is on stdin.
    """
    try:
        text = sys.stdin.read().rstrip("\n") if prompt == "-" else prompt
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt on stdin is not text: {error}") from error
    if not text.strip():
        raise ConfigError("the prompt is empty")
    history = _opening(system)
    _exchange(chat, history, text, max_new_tokens, _unheard if quiet else _say)
    return text, history[-1]["content"] if history[-1:] and history[-1]["role"] == "assistant" else ""


def loop(chat: Chat, *, system: str | None = None, max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS) -> None:
    """Answer line after line of stdin until it ends or says ``/exit`` or ``/quit``.

    On a terminal Ctrl-C stops the answer or drops the line, and an error is told and survived; elsewhere both end it.
    """
    survived: tuple[type[BaseException], ...] = ()
    interactive = sys.stdin.isatty()
    # readline must write the prompt itself to know where the cursor is, and writes it to stdout.
    editing = interactive and sys.stdout.isatty()
    lines = _History() if editing else None
    if interactive:
        survived = (KeyboardInterrupt, ShardmergeError, UnicodeError)
        _notice("/exit or Ctrl-D leaves, /reset forgets the conversation, Ctrl-C stops an answer")
    history = _opening(system)
    while True:
        try:
            if interactive and not editing:
                print("> ", end="", file=sys.stderr, flush=True)
            line = input("> " if editing else "")
            if lines is not None:
                lines.keep()
            if line.strip() in ("/exit", "/quit"):
                return
            if line.strip() == "/reset":
                history = _opening(system)
                _notice("the conversation is forgotten")
            elif line.strip():
                _exchange(chat, history, line, max_new_tokens, _say)
        except EOFError:
            if interactive:
                _notice("")  # Ctrl-D leaves the cursor behind the prompt
            return
        except survived as error:
            _notice("\n(stopped)" if isinstance(error, KeyboardInterrupt) else f"error: {error}")


class _History:
    """The lines that were typed, of this session and of those before it; the arrow keys bring them back.

    They are kept in a file of the user's own, one line at a time, as the program may be ended at any. Where there can
    be none, only this session's are remembered.
    """

    def __init__(self) -> None:
        self._file: Path | None = None
        self._known = 0
        with contextlib.suppress(ImportError):
            # Its import is what gives input() line editing.
            self._readline: Any = importlib.import_module("readline")
            with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home
                self._file = self._open(history_file())

    def _open(self, file: Path) -> Path:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
        readline = self._readline
        readline.set_history_length(_HISTORY)  # of the file, when it is written to
        readline.clear_history()
        readline.read_history_file(file)
        self._known = readline.get_current_history_length()
        return file

    def keep(self) -> None:
        """Write down what was typed since."""
        if self._file is None:
            return
        count = self._readline.get_current_history_length()
        with contextlib.suppress(OSError, AttributeError):  # libedit in readline's place may lack it
            # A line that repeats the one before it is not counted twice.
            self._readline.append_history_file(count - self._known, self._file)
        self._known = count


def history_file() -> Path:
    """Where lines are kept: a state of the user's, by the XDG base directories."""
    state = os.environ.get("XDG_STATE_HOME", "")
    # Only absolute paths count there.
    folder = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    return folder / "shardmerge" / "chat_history"


def _exchange(
    chat: Chat, history: list[Message], prompt: str, max_new_tokens: int, stream_to: Callable[[str], object]
) -> None:
    """One question and its answer, which join ``history`` as far as they came."""
    asked = {"role": "user", "content": prompt}
    heard: list[str] = []

    def hear(piece: str) -> None:
        heard.append(piece)
        stream_to(piece)

    try:
        chat.answer([*history, asked], max_new_tokens, hear)
    finally:
        if heard:  # an answer stopped before its first word leaves nothing that a template could show
            stream_to("\n")
            history += [asked, {"role": "assistant", "content": "".join(heard)}]


def _opening(system: str | None) -> list[Message]:
    return [{"role": "system", "content": system}] if system else []


def _say(piece: str) -> None:
    print(piece, end="", flush=True)


def _unheard(piece: str) -> None:
    pass


def _notice(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
