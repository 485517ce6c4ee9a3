"""Names that another class of the same model has for the modules of a checkpoint.

A multimodal checkpoint contains a text model that also has a class of its own. That class names a module
``model.layers.0…`` which the multimodal class names ``model.language_model.layers.0…``, and older checkpoints
``language_model.model.layers.0…``. An adapter of either class fits a checkpoint of the other. A `Dialect` is one such
naming, made from the table: it translates the path of the text model and the output head, and nothing else. So a module
of the text model never becomes one of a vision or audio tower, nor the other way round.

A text model that is not in the table may still differ from an adapter's names only in a prefix. Such a dialect is
`guessed` where an embedding of tokens is stored beside the layers, as in no tower of vision or audio, and where the
adapter's prefix is a usual name for a text model.

Source: ``AutoModelForCausalLM`` of transformers 5, which makes the text-only class from a multimodal config
(``text_config``) and reads the multimodal checkpoint into it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from shardmerge.key_mapping import table as tables
from shardmerge.key_mapping.rules import Rule, Rules, compose
from shardmerge.key_mapping.table import Architecture, Part

#: What input embeddings of tokens are called.
_EMBEDDINGS = ("embed_tokens", "wte", "tok_embeddings", "word_embeddings", "word_embedding", "embed_in", "token_embd")
#: What may stand before the layers of a text model in an adapter's names.
_CONTAINERS = frozenset(
    {
        *("model", "transformer", "decoder", "language_model", "text_model", "text_decoder", "language_decoder"),
        *("llm", "lm", "llm_model", "lang_model", "base_model", "thinker", "vlm", "mllm"),
    }
)
_HEADS = frozenset({"lm_head", "embed_out", "unembed_tokens", "output_projection"})


@dataclass(frozen=True)
class Dialect:
    """Another class's names of modules → the names of this checkpoint's class, both in memory."""

    #: The other class, for messages.
    class_name: str
    #: The path of the text model in the other class and in ours; "" is the model itself.
    text: tuple[str, str]
    #: The output head in the other class and in ours; "" where there is none.
    head: tuple[str, str] = ("", "")
    #: transformers' renamings for older checkpoints of the class.
    renamings: tuple[Rule, ...] = ()
    #: Whether it names a part other than the text model. Such a dialect is never chosen, but names that it explains are
    #: ambiguous.
    is_other: bool = False
    #: Whether it was guessed from the names; then it must explain all of them.
    is_guess: bool = False

    def ours(self, module: str) -> Iterator[str]:
        """The checkpoint's names of a module; none where it is in neither the text model nor the head."""
        # Rules are of tensors' names, and some look at their ends.
        renamed = Rules(self.renamings).forward(f"{module}.weight").name.removesuffix(".weight")
        for theirs in dict.fromkeys((module, renamed)):
            if theirs and theirs == self.head[0] and self.head[1]:
                yield self.head[1]
            elif (rest := below(theirs, self.text[0])) is not None:
                yield join(self.text[1], rest)


def of(parts: Sequence[Part]) -> list[Dialect]:
    """Every dialect for a checkpoint whose class consists of these parts, the class itself first."""
    found: dict[object, Dialect] = {}
    for dialect in (*_of_text_classes(parts), *_of_multimodal_classes(parts)):
        found.setdefault((dialect.text, dialect.head, dialect.renamings, dialect.is_other), dialect)
    return list(found.values())


def _of_text_classes(parts: Sequence[Part]) -> Iterator[Dialect]:
    """Dialects for a multimodal checkpoint: of its text model's class, and of parts around it."""
    texts = [part for part in parts if part.is_text]
    for text in texts:
        head = _head_around(parts, text.path)
        holders = _classes_of(text.architecture.name)
        for holder in holders:
            yield Dialect(holder.name, (holder.parts[0][0], text.path), (holder.output, head))
        if head and not any(holder.output for holder in holders):
            # transformers has no such class, but other trainers do, with the usual names.
            yield Dialect("a text-only class", ("model", text.path), ("lm_head", head))
    for part in parts if texts else ():
        if not part.path:
            continue
        output, name = part.architecture.output, part.architecture.name
        holds_text = any(below(text.path, part.path) is not None for text in texts)
        is_other = not holds_text and not any(below(part.path, text.path) is not None for text in texts)
        yield Dialect(name, ("", part.path), (output, join(part.path, output) if output else ""), is_other=is_other)
        if is_other and part.architecture.base_prefix:
            yield Dialect(name, (part.architecture.base_prefix, part.path), is_other=True)


def _head_around(parts: Sequence[Part], path: str) -> str:
    """The output head of the innermost model around a part that has one."""
    around = [part for part in parts if part.architecture.output and below(path, part.path) is not None]
    return join(around[-1].path, around[-1].architecture.output) if around else ""


def _of_multimodal_classes(parts: Sequence[Part]) -> Iterator[Dialect]:
    """Dialects for a checkpoint of a text model alone: of classes that contain it, or one like it."""
    root = parts[0].architecture if parts else None
    if root is None or any(part.is_text for part in parts):
        return
    ours, name = _inner_model(root)
    for class_name, model, theirs, head, renamings in sorted(_multimodal(), key=lambda found: found[1] != name):
        if model == name:
            yield Dialect(class_name, (theirs, ours), (head, root.output), renamings)
        elif _stands_alone(model) and _is_decoder(name):
            yield Dialect(f"a class such as {class_name}", (theirs, ours), (head, root.output), renamings)


def _inner_model(architecture: Architecture) -> tuple[str, str]:
    """Path and class of the model inside a class with a head, of the same config; or the class itself."""
    held = [(path, name) for path, name, key in architecture.parts if key == ""]
    return held[0] if len(held) == 1 else ("", architecture.name)


def _classes_of(model: str) -> Sequence[Architecture]:
    """The classes whose only part is a model of that class: with an output head, a classifier, …

    Those with an output head come first, since they are the ones that are trained.
    """
    return _holders().get(model, ())


@cache
def _holders() -> Mapping[str, Sequence[Architecture]]:
    """`_classes_of` every model."""
    known = tables.table().architectures
    found: defaultdict[str, list[Architecture]] = defaultdict(list)
    for holder in sorted(known.values(), key=lambda holder: not holder.output):
        if [key for _, _, key in holder.parts] == [""]:
            model = holder.parts[0][1]
            if holder.model_type == known[model].model_type:
                found[model].append(holder)
    return dict(found)


def _is_decoder(model: str) -> bool:
    """Whether there is a class with that model and an output head for the next token."""
    return any(holder.name.endswith("ForCausalLM") for holder in _classes_of(model))


def _stands_alone(model: str) -> bool:
    """Whether it is a decoder that was not made for one multimodal class. What contains Llama may contain others."""
    made_for_one = "_text" in tables.table().architectures[model].model_type
    return _is_decoder(model) and not made_for_one


@cache
def _multimodal() -> tuple[tuple[str, str, str, str, tuple[Rule, ...]], ...]:
    """Every class that contains a text model: its name, the text model's class and path, the head, the renamings."""
    found: dict[tuple[str, str, str, tuple[Rule, ...]], str] = {}
    for architecture in tables.table().architectures.values():
        parts = list(tables.parts(architecture, {}))
        for text in (part for part in parts if part.is_text):
            path, model = _inner_model(text.architecture)
            around = [part for part in parts if below(text.path, part.path)]
            head = _head_around(parts, text.path)
            found.setdefault((model, join(text.path, path), head, _renamings(architecture, around)), architecture.name)
    return tuple((name, *key) for key, name in found.items())


def _renamings(architecture: Architecture, around: Iterable[Part]) -> tuple[Rule, ...]:
    modules = [(part.path, part.architecture.name, part.architecture.model_type) for part in around]
    rules = compose(tables.table().rules, modules, architecture.base_prefix)
    return tuple(rule for rule in rules if not rule.operations and not rule.is_group)


def below(module: str, path: str) -> str | None:
    """The rest of a module's name below a path, "" for the path itself; None where the module is elsewhere."""
    if not path:
        return module
    if module == path:
        return ""
    return module[len(path) + 1 :] if module.startswith(f"{path}.") else None


def join(path: str, rest: str) -> str:
    """A path and what is below it as one name; either may be empty."""
    return ".".join(filter(None, (path, rest)))


# --- guessed from names ---------------------------------------------------------------------------------------------


def guessed(stored: Collection[str], modules: Sequence[str]) -> Iterator[Dialect]:
    """The changes of prefix that lead from the first module with a number to a layer of a text model that is stored."""
    anchor = next((module.split(".") for module in modules if _number(module.split(".")) > 0), None)
    if anchor is None:
        return
    number = _number(anchor)
    end = "." + ".".join([*anchor[number - 1 :], "weight"])
    for name in stored:
        if not f".{name}".endswith(end):
            continue
        segments = name.split(".")[:-1]
        theirs, ours = _differing(anchor, segments)
        beside = segments[: len(segments) - (len(anchor) - number + 1)]
        if _CONTAINERS.issuperset(theirs) and _is_text(stored, ".".join(beside)):
            change = ".".join(theirs), ".".join(ours)
            class_name = f"{change[1] or 'the top'} in the place of {change[0] or 'nothing'}"
            yield Dialect(class_name, change, _head(stored, modules, beside), is_guess=True)


def _number(segments: Sequence[str]) -> int:
    """Where the first number of a name is; −1: nowhere."""
    return next((i for i, segment in enumerate(segments) if segment.isdecimal()), -1)


def _differing(one: Sequence[str], other: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Both without the end that they have in common."""
    common = 0
    while common < min(len(one), len(other)) and one[-1 - common] == other[-1 - common]:
        common += 1
    return one[: len(one) - common], other[: len(other) - common]


def _is_text(stored: Collection[str], beside: str) -> bool:
    below = [join(beside, name) for embedding in _EMBEDDINGS for name in (embedding, f"embeddings.{embedding}")]
    return any(f"{name}.weight" in stored for name in below)


def _head(stored: Collection[str], modules: Sequence[str], beside: Sequence[str]) -> tuple[str, str]:
    """The adapter's output head, and the only one of that name on the way to the text model."""
    theirs = next((module for module in modules if module.rpartition(".")[2] in _HEADS), "")
    last = theirs.rpartition(".")[2]
    around = [join(".".join(beside[:count]), last) for count in range(len(beside) + 1)]
    found = [name for name in around if f"{name}.weight" in stored]
    return (theirs, found[0]) if theirs and len(found) == 1 else ("", "")
