"""Ollama's Modelfile for a GGUF file: the name of the file, the chat template, the texts at which answers stop.

A model's chat template is a Jinja program; Ollama's is in Go's template language. The program is not translated. It
renders a few conversations, and where it renders the same text as one of the `FORMATS`, the Modelfile gets the template
of that format. Otherwise the Modelfile has none, and Ollama uses the template in the GGUF file as far as it can.
Source: Ollama's docs/modelfile.md and docs/template.md.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardmerge.gguf.files import ModelFiles
from shardmerge.gguf.formats import KeyValue
from shardmerge.gguf.special_tokens import text_of

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Format:
    """The text of a turn of each role; ``{}`` stands for its content."""

    name: str
    user: str
    assistant: str
    system: str
    #: What an answer begins with.
    generation: str
    stops: tuple[str, ...]

    def render(self, messages: Sequence[Message]) -> str:
        turns = {"user": self.user, "assistant": self.assistant, "system": self.system}
        return "".join(turns[turn["role"]].replace("{}", turn["content"]) for turn in messages) + self.generation

    def template(self) -> str:
        """The same in Go's template language."""
        branches = []
        for word, role in (("if", "system"), ("else if", "user"), ("else if", "assistant")):
            text = getattr(self, role).replace("{}", "{{ .Content }}")
            branches.append(f'{{{{ {word} eq .Role "{role}" }}}}{text}')
        return "{{- range .Messages }}" + "".join(branches) + "{{ end }}{{ end }}" + self.generation


FORMATS = (
    Format(
        "ChatML",
        "<|im_start|>user\n{}<|im_end|>\n",
        "<|im_start|>assistant\n{}<|im_end|>\n",
        "<|im_start|>system\n{}<|im_end|>\n",
        "<|im_start|>assistant\n",
        ("<|im_start|>", "<|im_end|>"),
    ),
    Format(
        "Llama 3",
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    Format(
        "Gemma",
        "<start_of_turn>user\n{}<end_of_turn>\n",
        "<start_of_turn>model\n{}<end_of_turn>\n",
        "<start_of_turn>user\n{}<end_of_turn>\n",
        "<start_of_turn>model\n",
        ("<start_of_turn>", "<end_of_turn>"),
    ),
    Format(
        "Phi-3",
        "<|user|>\n{}<|end|>\n",
        "<|assistant|>\n{}<|end|>\n",
        "<|system|>\n{}<|end|>\n",
        "<|assistant|>\n",
        ("<|end|>", "<|user|>", "<|assistant|>"),
    ),
    Format(
        "Zephyr",
        "<|user|>\n{}</s>\n",
        "<|assistant|>\n{}</s>\n",
        "<|system|>\n{}</s>\n",
        "<|assistant|>\n",
        ("</s>", "<|user|>", "<|assistant|>"),
    ),
    Format("Mistral", "[INST] {}[/INST]", " {}</s>", "[INST] {}[/INST]", "", ("[INST]", "[/INST]", "</s>")),
    Format("Llama 2", "<s>[INST] {} [/INST]", " {} </s>", "<s>[INST] {} [/INST]", "", ("[INST]", "[/INST]", "</s>")),
)

#: Limits of the process that renders a template: seconds of CPU time, bytes of memory.
_SECONDS, _MEMORY = 10, 1 << 30
_ASKED = ({"role": "user", "content": "Quis?"},)
_TWICE = (*_ASKED, {"role": "assistant", "content": "Ego."}, {"role": "user", "content": "Quando?"})
_SYSTEM = {"role": "system", "content": "Esto brevis."}


@dataclass(frozen=True, slots=True)
class Known:
    """A format, and the system message that the template writes of its own accord."""

    format: Format
    system: str | None


def recognise(template: str, special: Mapping[str, str]) -> Known | None:
    """The format that a chat template writes, or None. ``special`` are texts that it may use: ``bos_token``, …

    It is an untrusted program, so it runs in Jinja's sandbox, in a process of its own that is bounded in time and
    memory.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "shardmerge.gguf.ollama"],
            input=json.dumps({"template": template, "special": special}),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=True,
        )
    except (subprocess.SubprocessError, OSError, UnicodeError):
        return None
    found = json.loads(done.stdout)
    # These quotes end a text in the Modelfile; a template could write any command after them.
    if found is None or '"""' in (found["system"] or ""):
        return None
    return Known(FORMATS[found["format"]], found["system"])


def _tried_out(template: str, special: Mapping[str, str]) -> Known | None:
    compiled = _compiled(template)

    def rendered(messages: Sequence[Message]) -> str | None:
        """The text of a conversation, up to where the answer begins; None where the template refuses it."""
        try:
            return str(compiled.render(messages=messages, add_generation_prompt=True, **special))
        except Exception:  # it is a program of the model's own, and may raise anything
            return None

    asked, twice = rendered(_ASKED), rendered(_TWICE)
    if compiled is None or asked is None or twice is None:
        return None
    for format_ in FORMATS:
        start, end = asked.find(format_.render(_ASKED)), format_.render(_ASKED)
        if start < 0 or not asked.endswith(end) or twice != asked[:start] + format_.render(_TWICE):
            continue
        # The token that begins a text is put there by the tokenizer, too.
        said, bos = asked[:start], special.get("bos_token", "")
        if said in ("", bos):
            return Known(format_, None)
        # What else comes before by itself must be a turn of the system, or Ollama could not say it.
        before, _, after = format_.system.partition("{}")
        system = rendered((_SYSTEM, *_ASKED))
        speaks = system is not None and system.endswith(format_.render((_SYSTEM, *_ASKED)))
        for text in (said, said.removeprefix(bos)):
            if speaks and text.startswith(before) and text.endswith(after):
                return Known(format_, text[len(before) : len(text) - len(after)])
    return None


def _compiled(template: str) -> Any:
    """A chat template in Jinja's sandbox, with what transformers gives it; None where it cannot be compiled."""
    try:
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        return None
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(template)
    except TemplateError:
        return None


def _refuse(message: str) -> None:
    raise ValueError(message)


def modelfile(file_name: str, values: Sequence[KeyValue], contents: Mapping[str, bytes]) -> str:
    """The whole Modelfile, for a GGUF file of these key-values that is beside it.

    ``contents`` are the small files that it was made of, of which tokenizer_config.json names the special tokens.
    """
    found = {value.key: value.value for value in values}
    template = found.get("tokenizer.chat_template")
    settings = ModelFiles(contents, []).json("tokenizer_config.json") or {}
    texts = {key: text_of(value) for key, value in settings.items()}
    special = {key: text for key, text in texts.items() if key.endswith("_token") and isinstance(text, str)}
    lines = [f"FROM ./{file_name}"]
    known = recognise(template, special) if isinstance(template, str) else None
    if known:
        lines.append(f'TEMPLATE """{known.format.template()}"""')
        lines += [f"PARAMETER stop {json.dumps(stop)}" for stop in known.format.stops]
        if known.system:
            lines.append(f'SYSTEM """{known.system}"""')
    return "\n".join(lines) + "\n"


def main() -> None:
    """The process that renders a template. It prints the format's number in `FORMATS` and the system message."""
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    given = json.loads(sys.stdin.read())
    known = _tried_out(given["template"], given["special"])
    print(json.dumps(known and {"format": FORMATS.index(known.format), "system": known.system}))


if __name__ == "__main__":
    main()
