"""Finds llama.cpp's name of a byte-level tokenizer's pre-tokenizer, by the ids that it gives for a text.

Only tokenizers that a test covers are named: with a wrong name, llama.cpp silently tokenizes otherwise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

#: Pre-tokenizers split these differently: digits, contractions, case, blanks, line ends, scripts, marks, emoji.
PROBE = (
    "It's 1 12 123 1234 12345678 o'clock, we'LL I'M they'Ve\n\n\n  \t two  three   four\r\n end. ... !!! -- ==> {}();//"
    "\nЗдравствуй, мир42 नमस्ते 你好世界2024年 こんにちは สวัสดี שלום 🚀🙂‍↔️ é e\u0301 naïve_snake camelCase $3.14 x²\n\t\t"
    "if (a!=b) {return\u00a0'n';}  "
)
#: SHA-256 of a tokenizer's ids of `PROBE` → llama.cpp's name of its pre-tokenizer. tests/gguf/test_gguf_conversion.py
#: compares each with the official converter's.
PRE_TOKENIZERS: Mapping[str, str] = {
    "de4bc19b86f9a2fcd6f59afac33e78b8c9c203f2a5c4106484018688af360fd5": "smollm",  # SmolLM, SmolLM2
    "bbf38b538da7e4498bc40588098417d713bdc0c03d4690d98280e1b451ccea3e": "smaug-bpe",  # Llama 3, at first
    "4e95e51138a84a14b194674a09d3e370e03499879b6210d315cb2ce377a0c7c2": "llama-bpe",  # Llama 3.1 to 3.3
    "23e1720b18d16e61c83676f92d1e3713a14e50767126b25179cd719cb4060124": "qwen2",  # Qwen2 to Qwen3
}


class _Encoding(Protocol):
    @property
    def ids(self) -> list[int]: ...


class Tokenizer(Protocol):
    """The methods of `tokenizers.Tokenizer` that are used here."""

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]: ...
    def get_added_tokens_decoder(self) -> dict[int, Any]: ...
    def encode(self, sequence: str, *, add_special_tokens: bool = True) -> _Encoding: ...
    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str: ...


def open_tokenizer(content: bytes, problems: list[str]) -> Tokenizer | None:
    """The tokenizer of ``tokenizer.json``; None, and a problem, if it cannot be used."""
    try:
        from tokenizers import Tokenizer as Opened
    except ImportError:
        problems.append("GGUF with this tokenizer needs the package tokenizers: pip install tokenizers")
        return None
    try:
        opened: Tokenizer = Opened.from_str(content.decode())
    except Exception as error:  # tokenizers raises Exception itself
        problems.append(f"tokenizer.json cannot be used: {error}")
        return None
    return opened


def pre_tokenizer(tokenizer: Tokenizer) -> str | None:
    """llama.cpp's name of the pre-tokenizer; None if it is unknown."""
    ids = tokenizer.encode(PROBE, add_special_tokens=True).ids
    return PRE_TOKENIZERS.get(hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest())
