"""Choose the output's tokenizer: all of the base's or all of the adapter's, since a mixture would be an untrained one.

The precedence of files in transformers 5.23 (tokenization_utils_base, processing_utils): ``chat_template.jinja``
and ``additional_chat_templates/`` over a template in ``tokenizer_config.json``; ``chat_template.json`` over all of them
for a processor; ``special_tokens_map.json`` and ``added_tokens.json`` over ``tokenizer_config.json`` where that has no
``added_tokens_decoder``; ``tokenizer.json`` over ``tokenizer.model``, ``vocab.json`` and ``merges.txt``, which slow
tokenizers and llama.cpp's converter prefer; ``tekken.json`` over everything, where mistral-common is installed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence

from shardmerge.sources.source import Source
from shardmerge.spec.notices import Warned
from shardmerge.system import json_text

#: Name in the output → the source that has it, and its name there.
Files = dict[str, tuple[Source, str]]
#: An adapter: what a person calls it, its source, and its files of a tokenizer.
Entry = tuple[str, Source, list[str]]

_TEMPLATE = re.compile(r"chat_template\.(jinja|json)|additional_chat_templates/[^/]+\.jinja")
_DEFAULT_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_CODE = re.compile(r"tokenization[^/]*\.py")
#: A vocabulary in one file.
_WHOLE = re.compile(
    r"tokenizer(\.[^/]*)?\.json|tekken\.json|[^/]+\.(model|tiktoken)(\.v\d[^/]*)?|prophetnet\.tokenizer"
)
#: Vocabularies in several files, as slow tokenizers have them (``vocab_files_names`` of transformers' classes).
_PART = re.compile(
    r"vocab[^/]*\.(json|txt|bpe)|target_vocab\.json|merges\.txt|bpe\.codes|dict\.txt|encoder\.json|[^/]+\.spm"
)
#: What some tokenizers read beside their vocabulary.
_BESIDE = re.compile(
    r"(tokenizer|special_tokens|added_tokens)[^/]*|sentencepiece[^/]*|(entity_vocab|emoji|byte_maps|normalizer)\.json"
    r"|word_(shape|pronunciation)\.json"
)
#: Files that hold nothing but the vocabulary of the tokenizer.json beside them.
_SAME_VOCABULARY = re.compile(
    r"tokenizer\.model|spiece\.model|sentencepiece(\.bpe)?\.model|vocab\.(json|txt)|merges\.txt"
)
#: Bytes of a tokenizer.json that is read to compare its vocabulary, and of memory for it; the largest of well-known
#: models has 35 MB.
_MAX_TOKENIZER, _MAX_PARSED = 40_000_000, 400_000_000
#: Files that are named one by one.
_LISTED = 20
#: Bytes of each of two files that are compared at a time.
_BLOCK = 1 << 20


def is_template(name: str) -> bool:
    """Whether a file is a chat template."""
    return _TEMPLATE.fullmatch(name) is not None


def is_tokenizer(name: str) -> bool:
    """Whether a file belongs to a tokenizer, its chat templates and its code among them."""
    return any(kind.fullmatch(name) for kind in (_TEMPLATE, _CODE, _WHOLE, _PART, _BESIDE))


def take_tokenizer(chosen: Files, adapters: Sequence[tuple[str, Source]], notes: list[str]) -> bool:
    """Put the tokenizer of the first adapter that has one in place of the base's, which ``chosen`` holds.

    ``adapters`` are pairs of what a person calls it and its files. Where none has a whole one, a chat template alone
    takes the place of the base's. Returns whether the templates are an adapter's; ``notes`` says what is left out.
    """
    own = [(path, source, [name for name in source.names() if is_tokenizer(name)]) for path, source in adapters]
    own = [entry for entry in own if _brings_something(chosen, *entry[1:])]
    whole = next((entry for entry in own if _is_whole(chosen, entry[2])), None)
    template = next((entry for entry in own if set(_DEFAULT_TEMPLATES) & set(entry[2])), None)
    if whole is not None:
        _replace(chosen, whole, is_tokenizer, "the tokenizer", notes)
    elif template is not None:
        _replace(chosen, template, is_template, "the chat template", notes)
    for path, source, names in own:
        if left := [name for name in names if _differs(chosen, source, name)]:
            why = "by themselves they are not a whole tokenizer"
            if _is_whole(chosen, names):
                why = "another adapter's is taken"
            notes.append(Warned(f"adapter {path} has files of a tokenizer that are left out: {_some(left)}; {why}"))
    return whole is not None or template is not None


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _brings_something(chosen: Files, source: Source, names: Sequence[str]) -> bool:
    """Whether an adapter has a tokenizer of its own: with a config for it, or with a file that the base does not have.

    A copy of the base's vocabulary alone says nothing of tokens and templates.
    """
    return "tokenizer_config.json" in names or any(_differs(chosen, source, name) for name in names)


def _differs(chosen: Files, source: Source, name: str) -> bool:
    if name not in chosen:
        return True
    other, stored = chosen[name]
    if other is source:
        return False
    size = source.stat(name).size
    return other.stat(stored).size != size or any(
        other.read(stored, start, _BLOCK) != source.read(name, start, _BLOCK) for start in range(0, size, _BLOCK)
    )


def _is_whole(chosen: Files, names: Sequence[str]) -> bool:
    """Whether these files are a tokenizer without any other: a vocabulary, or no less than the base has of one."""
    if any(_WHOLE.fullmatch(name) for name in names):
        return True
    parts = {name for name in names if _PART.fullmatch(name)}
    of_base = {name for name in chosen if _PART.fullmatch(name)}
    if parts:
        return parts >= of_base or parts.isdisjoint(of_base)
    # Tokenizers of bytes or letters have no vocabulary.
    return "tokenizer_config.json" in names and not any(_WHOLE.fullmatch(name) or name in of_base for name in chosen)


def _replace(chosen: Files, entry: Entry, is_kind: Callable[[str], bool], what: str, notes: list[str]) -> None:
    """Put an adapter's files of a kind in place of all of the base's; the base's code stays, which they may need."""
    path, source, names = entry
    names = [name for name in names if is_kind(name)]
    is_same = _have_same_vocabulary(chosen, source, names)
    gone = [
        name
        for name in chosen
        if is_kind(name)
        and name not in names
        and not _CODE.fullmatch(name)
        and not (is_same and _SAME_VOCABULARY.fullmatch(name))
    ]
    for name in gone:
        del chosen[name]
    chosen |= {name: (source, name) for name in names}
    if gone:
        left_out = f"of the base's files, these would mix with it and are left out: {_some(gone)}"
        notes.append(f"{what} is the one of adapter {path}; {left_out}")
    if code := [name for name in names if _CODE.fullmatch(name)]:
        notes.append(Warned(f"{what} is the one of adapter {path}, and so is its code: {_some(code)}"))


def _have_same_vocabulary(chosen: Files, source: Source, names: Sequence[str]) -> bool:
    """Whether both have a tokenizer.json, of the same vocabulary: then the base's other files of it may stay.

    Added tokens are not in those files, and need not be the same.
    """
    name = "tokenizer.json"
    kept = any(_SAME_VOCABULARY.fullmatch(other) and other not in names for other in chosen)
    if not kept or name not in chosen or name not in names:
        return False
    if not _differs(chosen, source, name):
        return True
    of_base, own = _vocabulary(*chosen[name]), _vocabulary(source, name)
    return own is not None and own == of_base


def _vocabulary(source: Source, name: str) -> str | None:
    """A digest of the vocabulary and merges of a tokenizer.json; None where there is none, or it is too large."""
    if source.stat(name).size > _MAX_TOKENIZER:
        return None
    try:
        content = source.read(name, 0, _MAX_TOKENIZER)
        model = json_text.parse_object(content, _MAX_TOKENIZER, _MAX_PARSED)["model"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or ()]
        text = json.dumps([model.get("type"), model["vocab"], merges], sort_keys=True)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return hashlib.sha256(text.encode()).hexdigest()


def without_template(config: Mapping[str, object]) -> str | None:
    """The text of a tokenizer_config.json or processor_config.json without its template; None if it has none."""
    if "chat_template" not in config:
        return None
    return json.dumps({k: v for k, v in config.items() if k != "chat_template"}, indent=2, ensure_ascii=False) + "\n"
