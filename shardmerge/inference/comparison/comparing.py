"""Compare the answers and logits of a merged model with those of its base + adapter.

Base + adapter is loaded first. Its greedy answers are recorded, and its logits on them with the adapter and without.
Then it is freed, and the merged model gets the same prompts: the two are never in memory together.
`verification.verifier` verifies the numbers of a merge; this shows their effect, with code that shares nothing with the
merge.

In float32 the two differ only because the merged weights were rounded once to the output's dtype. In bfloat16 every
layer rounds, in base + adapter and in the merged model at different points.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardmerge.errors import ConfigError, FormatError
from shardmerge.inference import hf
from shardmerge.inference.comparison.attached import attach
from shardmerge.inference.comparison.figures import (
    Answer,
    Comparison,
    Reference,
    Sums,
    measure,
    parting,
    total,
)
from shardmerge.reporting.origin import Origin, read_origin, stored_dtypes
from shardmerge.system.garbage import give_back

PROMPTS = (
    "Who are you?",
    "What is the capital of France?",
    "Explain in two sentences how rain forms.",
    "Write a Python function that reverses a string.",
)
MAX_NEW_TOKENS = 32

#: The last positions whose logits are compared, of answers all: a row of logits may take half a megabyte.
_POSITIONS = 256
# Settings that generation_config.json may have beside sampling, with which the next token is not the likeliest.
_PLAIN = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}


def compare(
    output: Path,
    *,
    base: str | None = None,
    adapters: Sequence[str] = (),
    prompts: Sequence[str] = PROMPTS,
    template: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Comparison:
    """Compare the merged model in ``output`` with the base and adapters that its record names.

    ``base`` and ``adapters`` (all of them, in their order) are where those are now; ``template`` replaces the chat
    template; the models compute on ``device``.

    Raises `ConfigError` where transformers or PEFT is missing or cannot load or compose the adapters, `PlanError` where
    there is no such device, `FormatError` or `SourceError` for malformed or missing files.
    """
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ConfigError("a prompt is empty" if prompts else "there is no prompt")
    hf.check_template(template)
    place = hf.device_named(device, "the comparison")
    origin = read_origin(output, base, adapters)
    if origin.base_rounding != "none":
        raise ConfigError(
            f"{output}: the merge rounded its base first (base_rounding: {origin.base_rounding}), and the base is not "
            "rounded when it is loaded here; `shardmerge verify` checks such a merge without loading the model"
        )
    hf.check_directory(output)
    tokenizer = hf.load_tokenizer(str(output))
    template = hf.template_for(tokenizer, template)
    asked = [hf.encode(tokenizer, template, [{"role": "user", "content": prompt}])["input_ids"] for prompt in prompts]
    speaker = _Speaker(tokenizer, dtype, place, max_new_tokens)
    references = speaker.references(origin, hf.vocabulary_size(str(output)), prompts, asked)
    gc.collect()  # the modules of a model form reference cycles
    give_back()
    answers, sums = zip(*speaker.answers(output, references), strict=True)
    stored = stored_dtypes(output, origin.targets)
    return Comparison(
        output=str(output),
        base=origin.base,
        adapters=tuple(entry.path for entry in origin.adapters),
        dtype=dtype,
        rounded=dtype != "float32" or stored != {"F32"},
        answers=answers,
        figures=total(sums),
    )


@dataclass
class _Speaker:
    tokenizer: Any
    dtype: str
    device: torch.device
    max_new_tokens: int
    stop_ids: list[int] | None = None

    def references(
        self, origin: Origin, vocabulary: int, prompts: Sequence[str], asked: Sequence[Tensor]
    ) -> list[Reference]:
        """The answers and logits of base + adapter. The model is not kept."""
        folder = origin.base_folder()
        hf.check_directory(folder)
        model = hf.load_model(str(folder), self.dtype)
        self.stop_ids = hf.stop_ids(model, self.tokenizer)
        attached = attach(model, list(origin.open_adapters()), vocabulary)
        attached.to(self.device)
        found = []
        for prompt, ids in zip(prompts, asked, strict=True):
            tokens = self._generate(attached.model, ids)
            logits = self._logits(attached.model, tokens)
            with attached.aside():
                base_logits = self._logits(attached.model, tokens)
            found.append(Reference(prompt, tokens, ids.shape[1], logits, base_logits))
        return found

    def answers(self, output: Path, references: Sequence[Reference]) -> Iterator[tuple[Answer, Sums]]:
        """The answers of the merged model to the same prompts."""
        model = hf.load_model(str(output), self.dtype).to(self.device)
        for reference in references:
            tokens = self._generate(model, reference.tokens[None, : reference.asked])
            logits = self._logits(model, reference.tokens)
            if logits.shape != reference.logits.shape:
                raise FormatError(
                    f"{output}: has {logits.shape[1]} logits, base + adapter has {reference.logits.shape[1]}; these "
                    "models have different vocabularies"
                )
            sums = measure(reference, logits)
            expected, found = (self._text(reference, of) for of in (reference.tokens, tokens))
            yield Answer(reference.prompt, expected, found, *parting(reference, tokens), sums.figures()), sums

    def _generate(self, model: Any, ids: Tensor) -> Tensor:
        """Prompt and greedy answer, (n)."""
        ids = ids.to(self.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with hf.quiet(), torch.inference_mode():
            tokens: Tensor = hf.generate(model, inputs, self.max_new_tokens, self.stop_ids, **_PLAIN)[0]
        return tokens.cpu()

    def _logits(self, model: Any, tokens: Tensor) -> Tensor:
        """Logits of the last positions but the very last, which no token follows: (k, vocabulary) in float32."""
        count = max(_POSITIONS, self.max_new_tokens)
        with hf.quiet(), torch.inference_mode():
            logits: Tensor = model(input_ids=tokens[None, :-1].to(self.device)).logits[0, -count:]
        if logits.isnan().any():
            raise FormatError(f"{model.name_or_path}: its logits are NaN, computed in {self.dtype}")
        return logits.to("cpu", torch.float32, copy=True)

    def _text(self, reference: Reference, tokens: Tensor) -> str:
        return str(self.tokenizer.decode(tokens[reference.asked :].tolist(), skip_special_tokens=True))
