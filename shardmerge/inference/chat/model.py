"""A model that answers, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardmerge.errors import ConfigError
from shardmerge.inference import hf
from shardmerge.inference.hf import Message


@dataclass(frozen=True, slots=True)
class Chat:
    """A model that answers; made by `load`."""

    tokenizer: Any
    model: Any
    #: The plain template in use, which has room for the last prompt only; None for the tokenizer's chat template.
    template: str | None

    def answer(self, messages: Sequence[Message], max_new_tokens: int, stream_to: Callable[[str], object]) -> str:
        """The greedy answer to ``messages``, the last of which is the user's.

        ``stream_to`` receives each piece of text as soon as it is certain; together they are the returned text.
        """
        if max_new_tokens < 1:
            raise ConfigError(f"max new tokens is {max_new_tokens}; expected 1 or more")
        streamer = Streamer(self._decode, stream_to)
        with hf.quiet():
            encoded = hf.encode(self.tokenizer, self.template, messages)
            inputs = {name: tensor.to(self.model.device) for name, tensor in encoded.items()}
            stop = hf.stop_ids(self.model, self.tokenizer)
            hf.generate(self.model, inputs, max_new_tokens, stop, streamer=streamer)
        return streamer.text

    def _decode(self, ids: list[int]) -> str:
        # Clean-up takes back a space that was already streamed ("word ," becomes "word,").
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@dataclass
class Streamer:
    """The streamer of ``generate``, which puts the prompt first, then each new token, and then calls ``end``."""

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


def load(path: str, template: str | None = None, device: str = "auto") -> Chat:
    """Load the model in the directory ``path``, in its stored dtype, without network and without running its code.

    ``device`` is cpu, cuda or cuda:1; auto is the CPU. ``template`` replaces the tokenizer's chat template; ``\\n`` in
    it, typed as two characters, is a newline.
    """
    hf.check_template(template)
    place = hf.device_named(device, "the chat")
    hf.check_directory(Path(path))
    tokenizer = hf.load_tokenizer(path)
    return Chat(tokenizer, hf.load_model(path).to(place), hf.template_for(tokenizer, template))
