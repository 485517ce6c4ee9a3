"""Dialects of checkpoints that the table does not know, guessed from the names themselves.

``model.layers.0.self_attn.q_proj`` of an adapter and ``llm.model.layers.0.self_attn.q_proj.weight`` of a checkpoint
end alike, and what stands before differs: nothing ↔ ``llm``. Such a change of prefix is a dialect if it is certain that
what it leads to is a text model: an embedding of tokens is stored beside the layers, as in no tower of vision or audio.
What the adapter has before must be a name that text models are kept under.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from shardmerge.key_mapping.dialects import Dialect, join

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


def of(stored: Collection[str], modules: Sequence[str]) -> Iterator[Dialect]:
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
