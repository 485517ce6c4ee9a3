"""Talk to a finished model, to see with one's own eyes what a merge did to it.

Answers are greedy, so that two runs can be compared, and go to stdout; prompts and notices go to stderr. `transformers`
is an extra, imported when it is needed; it pushes tokens into `_Streamer` from the caller's own thread, so that Ctrl-C
is an ordinary ``KeyboardInterrupt`` out of ``generate`` and nothing is left running.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardmerge.errors import ConfigError, FormatError, ShardmergeError, SourceError

#: What a prompt is put into where the tokenizer has no chat template; ``{}`` is the prompt's place.
DEFAULT_TEMPLATE = "### Instruction:\n{}\n\n### Response:\n"
DEFAULT_MAX_NEW_TOKENS = 512

#: ``{"role": "system" | "user" | "assistant", "content": text}``
Message = dict[str, str]

# generation_config.json may ask for sampling or beams; neither can be compared or streamed.
_GREEDY = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


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
        with _quiet():
            encoded = self._encode(messages)
            inputs = {name: encoded[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
            limits = {"max_new_tokens": max_new_tokens, "eos_token_id": self._stop_ids()}
            try:
                self.model.generate(**inputs, **limits, **_GREEDY, streamer=streamer)
            except IndexError as error:  # learned position embeddings end where the context does
                raise ConfigError("prompt and answer are longer than the model's context") from error
        return streamer.text

    def _encode(self, messages: Sequence[Message]) -> Any:
        if self.template is not None:
            opening = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
            filled = self.template.replace("{}", messages[-1]["content"])
            return self.tokenizer(opening + filled, return_tensors="pt")
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        except Exception as error:  # a chat template is a program of the model's own and may raise anything
            raise ConfigError(f"the chat template refuses: {_reason(error)}; --template goes around it") from error

    def _decode(self, ids: list[int]) -> str:
        # Clean-up takes back a space that was already streamed ("word ," becomes "word,").
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _stop_ids(self) -> list[int] | None:
        # A tuned model often ends its turn with the tokenizer's token while its config still names the base's.
        known = self.model.generation_config.eos_token_id
        ids = {self.tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])}
        return sorted(ids - {None}) or None


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
    if template is not None and (count := template.count("{}")) != 1:
        raise ConfigError(f"the template {template!r} has {count} places {{}} for the prompt; expected exactly 1")
    _check_directory(Path(path))
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError("chat needs transformers: pip install 'shardmerge[hf]'") from error
    dtype = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
            options |= {dtype: "auto", "use_safetensors": True, "output_loading_info": True}
            model, found = transformers.AutoModelForCausalLM.from_pretrained(path, **options)
    except Exception as error:  # transformers has no error class of its own: a bad file comes as nearly anything
        raise FormatError(f"{path}: transformers cannot load this model: {_reason(error)}") from error
    _check_tensors(path, found)
    template = template or (None if tokenizer.chat_template else DEFAULT_TEMPLATE)
    return Chat(tokenizer, model.eval(), template and template.replace("\\n", "\n"))


def once(chat: Chat, prompt: str, *, system: str | None = None, max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS) -> None:
    """Write the answer to ``prompt`` to stdout; the prompt ``-`` stands for what is on stdin."""
    try:
        text = sys.stdin.read().rstrip("\n") if prompt == "-" else prompt
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt on stdin is not text: {error}") from error
    if not text.strip():
        raise ConfigError("the prompt is empty")
    _exchange(chat, _opening(system), text, max_new_tokens)


def loop(chat: Chat, *, system: str | None = None, max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS) -> None:
    """Answer line after line of stdin until it ends or says ``/exit`` or ``/quit``.

    On a terminal Ctrl-C stops the answer or drops the line, and an error is told and survived; elsewhere both end it.
    """
    survived: tuple[type[BaseException], ...] = ()
    if interactive := sys.stdin.isatty():
        survived = (KeyboardInterrupt, ShardmergeError, UnicodeError)
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # its import is what gives input() line editing
        _notice("/exit or Ctrl-D leaves, /reset forgets the conversation, Ctrl-C stops an answer")
    history = _opening(system)
    while True:
        try:
            line = _read_line(interactive)
            if line.strip() in ("/exit", "/quit"):
                return
            if line.strip() == "/reset":
                history = _opening(system)
                _notice("the conversation is forgotten")
            elif line.strip():
                _exchange(chat, history, line, max_new_tokens)
        except EOFError:
            if interactive:
                _notice("")  # Ctrl-D leaves the cursor behind the prompt
            return
        except survived as error:
            _notice("\n(stopped)" if isinstance(error, KeyboardInterrupt) else f"error: {error}")


def _exchange(chat: Chat, history: list[Message], prompt: str, max_new_tokens: int) -> None:
    """One question and its answer, which join ``history`` as far as they came."""
    asked = {"role": "user", "content": prompt}
    heard: list[str] = []

    def hear(piece: str) -> None:
        heard.append(piece)
        _say(piece)

    try:
        chat.answer([*history, asked], max_new_tokens, hear)
    finally:
        if heard:  # an answer stopped before its first word leaves nothing that a template could show
            _say("\n")
            history += [asked, {"role": "assistant", "content": "".join(heard)}]


def _read_line(interactive: bool) -> str:
    """The next line of stdin; ``EOFError`` at its end."""
    # readline must write the prompt itself to know where the cursor is, and writes it to stdout.
    editing = interactive and sys.stdout.isatty()
    if interactive and not editing:
        print("> ", end="", file=sys.stderr, flush=True)
    return input("> " if editing else "")


def _opening(system: str | None) -> list[Message]:
    return [{"role": "system", "content": system}] if system else []


def _say(piece: str) -> None:
    print(piece, end="", flush=True)


def _notice(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _check_directory(path: Path) -> None:
    if not path.is_dir():
        raise SourceError(f"{path}: expected a model's directory, found {'a file' if path.exists() else 'nothing'}")
    for names in (("config.json",), _WEIGHTS):
        if not any((path / name).is_file() for name in names):
            raise FormatError(f"{path}: not a finished model: there is no {' or '.join(names)}")
    if (path / "adapter_config.json").exists():
        # transformers would quietly load the adapter's base from somewhere else.
        raise FormatError(f"{path}: has an adapter_config.json; expected a merged model and no adapter beside it")


def _check_tensors(path: str, found: Any) -> None:
    """Refuse what transformers would make up, tell what it leaves out: both are warnings that `_quiet` swallows."""
    if missing := sorted(found["missing_keys"]):
        raise FormatError(f"{path}: {len(missing)} of the model's tensors are not in its files, such as {missing[0]}")
    if unexpected := sorted(found["unexpected_keys"]):
        _notice(f"{path}: {len(unexpected)} tensors are no part of this model and unused, such as {unexpected[0]}")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings and no progress bars from transformers inside; both are put back as they were."""
    logging = importlib.import_module("transformers.utils.logging")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
