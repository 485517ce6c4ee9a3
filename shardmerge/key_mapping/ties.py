"""Weights that are one in memory, of which a checkpoint commonly stores one.

Where the architecture is known, the table says what transformers ties. Elsewhere only the config and the usual names of
embeddings and output heads are left, which are a guess: `shardmerge.planning.untying` asks before it acts upon one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardmerge.key_mapping.naming import NUMBER, numberless

#: What input embeddings are called, and the head of the same model.
_HEAD_OF = {
    "embed_in": "embed_out",
    "embed_tokens": "lm_head",
    "tok_embeddings": "output",
    "tokens_embed": "lm_head",
    "word_embeddings": "lm_head",
    "wte": "lm_head",
}
#: Where such an embedding is stored → where the head is.
_PLACES = {
    "gpt_neox": "",
    "model": "",
    "transformer": "",
    "model.language_model": "",
    "language_model.model": "language_model",
}
_HEADS = frozenset(
    {
        *("embed_out", "generator_lm_head", "head", "lm_head", "lm_loss", "output", "output_layer"),
        *("output_projection", "proj_out", "vocab_projector"),
    }
)

#: Of these, names that models without a vocabulary have, too.
_MISTAKABLE = frozenset({"head", "output", "output_layer", "output_projection", "proj_out"})


@dataclass(frozen=True, slots=True)
class Tie:
    """One tensor in memory, by all its names in the checkpoint's style."""

    #: The name to which the class ties the others.
    source: str
    #: The one that is stored; the source, if that is.
    main: str
    #: The other names, stored or not; empty where the name of the head is not known.
    others: tuple[str, ...]
    #: (name in memory, name in the checkpoint) of the others whose names differ.
    in_memory: tuple[tuple[str, str], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.main, *self.others)


def expanded(pairs: Mapping[str, str], numbers: Mapping[str, Collection[tuple[str, ...]]]) -> Iterator[tuple[str, str]]:
    """Pairs of tied weight and source, for all ``numbers`` that stand for # in the names of either."""
    for target, source in pairs.items():
        for found in sorted({*numbers.get(target, ()), *numbers.get(source, ())}) if "#" in target else [()]:
            yield _filled(target, found), _filled(source, found)


def numbers_of(names: Iterable[str]) -> dict[str, set[tuple[str, ...]]]:
    """By template, the numbers of the names that have it."""
    found: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)
    for name in names:
        found[numberless(name)].add(tuple(NUMBER.findall(name)))
    return found


def _filled(name: str, numbers: tuple[str, ...]) -> str:
    left = iter(numbers)
    return re.sub("#", lambda _: next(left), name)


def grouped(pairs: Mapping[str, str]) -> dict[str, list[str]]:
    """Sources that are tied to nothing themselves → all that is tied to them, in order."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for target, source in pairs.items():
        seen = {target}
        while source in pairs and source not in seen:
            seen.add(source)
            source = pairs[source]
        groups[source].append(target)
    return groups


# --- where the architecture is not known ------------------------------------------------------------------------------


def _said(config: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    """The values of a key in config.json and its text part that have exactly that type."""
    inner = config.get("text_config")
    sections = (config, inner if isinstance(inner, Mapping) else {})
    return [value for section in sections if type(value := section.get(key)) is kind]


def is_head(module: str) -> bool:
    """Whether a module has a usual name of an output head."""
    return module.rpartition(".")[2] in _HEADS


def guessed(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Tie]:
    """The weights that may be tied in a model of which only names, shapes and the config are known."""
    tied = next(iter(_said(config, "tie_word_embeddings", bool)), None)
    if tied is False:
        return
    sizes = _said(config, "vocab_size", int)
    found = [name for name, shape in shapes.items() if len(shape) == 2 and _is_of_vocabulary(name, shape, sizes)]
    heads = [name for name in found if is_head(name.removesuffix(".weight"))]
    embeddings = [name for name in found if name not in heads]
    if not embeddings and tied is None and not sizes:
        # An image model's last layer may be called so, too, and nothing else speaks of a vocabulary.
        found = [name for name in found if name.removesuffix(".weight").rpartition(".")[2] not in _MISTAKABLE]
    if heads and embeddings:
        if tied and len(heads) == len(embeddings) == 1 and shapes[heads[0]] == shapes[embeddings[0]]:
            yield Tie(embeddings[0], embeddings[0], (heads[0],))
        return
    for name in found:
        head = head_of(name) if len(found) == 1 else None
        yield Tie(name, name, (head,) if head and head not in shapes else ())


def _is_of_vocabulary(name: str, shape: tuple[int, ...], sizes: Sequence[int]) -> bool:
    module = name.removesuffix(".weight")
    if module == name:
        return False
    return shape[0] in sizes[:1] or module.rpartition(".")[2] in (_HEAD_OF.keys() | _HEADS)


def head_of(embedding: str) -> str | None:
    """The usual name of the output head for an embedding; None where there is none."""
    place, _, last = embedding.removesuffix(".weight").rpartition(".")
    if last not in _HEAD_OF or place not in _PLACES:
        return None
    return ".".join(filter(None, (_PLACES[place], _HEAD_OF[last], "weight")))


Style = Callable[[str], str]


def tie_of(
    source: str, targets: Iterable[str], stored: Callable[[str], str | None], style_of: Callable[[str, str], Style]
) -> Tie | None:
    """The tie of names in memory, by the names that the checkpoint has or would have; None where none is stored.

    transformers ties to the source, and where that is not stored to the first of the others that is.
    """
    members = {name: stored(name) for name in (source, *targets)}
    there = next(((name, found) for name, found in members.items() if found), None)
    if there is None:
        return None
    style = style_of(there[0], there[1] or "")
    named = {name: found or style(name) for name, found in members.items()}
    main = named[there[0]]
    others = dict.fromkeys(name for name in named.values() if name != main)
    in_memory = tuple((name, here) for name, here in named.items() if here in others and here != name)
    return Tie(named[source], main, tuple(others), in_memory) if others else None
