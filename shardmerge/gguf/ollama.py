"""Writes Ollama's Modelfile for a GGUF file: the file's name, the chat template, the texts at which answers stop.

A model's chat template is a Jinja program; Ollama's is in Go's template language. The program is not translated, but
run: if it renders a few conversations as one of the `FORMATS` does, the Modelfile gets the template of that format.
Otherwise the Modelfile has none, and Ollama uses the template in the GGUF file as far as it can.
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
    """The text of a turn of each role, with ``{}`` for its content."""

    name: str
    user: str
    assistant: str
    system: str
    #: The text before an answer.
    generation: str
    stops: tuple[str, ...]

    def render(self, messages: Sequence[Message]) -> str:
        turns = {"user": self.user, "assistant": self.assistant, "system": self.system}
        return "".join(turns[turn["role"]].replace("{}", turn["content"]) for turn in messages) + self.generation

    def template(self) -> str:
        """The format in Go's template language."""
        branches = []
        for word, role in (("if", "system"), ("else if", "user"), ("else if", "assistant")):
            text = getattr(self, role).replace("{}", "{{ .Content }}")
            branches.append(f'{{{{ {word} eq .Role "{role}" }}}}{text}')
        return "{{- range .Messages }}" + "".join(branches) + "{{ end }}{{ end }}" + self.generation


def _tagged(
    name: str, head: str, end: str, stops: tuple[str, ...], model: str = "assistant", system: str = "system"
) -> Format:
    """A format in which each turn is ``head``, with the role in place of ``@``, the content, and ``end``."""
    user, assistant, instructions = (f"{head.replace('@', role)}{{}}{end}" for role in ("user", model, system))
    return Format(name, user, assistant, instructions, head.replace("@", model), stops)


_INST = ("[INST]", "[/INST]", "</s>")
FORMATS = (
    _tagged("ChatML", "<|im_start|>@\n", "<|im_end|>\n", ("<|im_start|>", "<|im_end|>")),
    _tagged(
        "Llama 3",
        "<|start_header_id|>@<|end_header_id|>\n\n",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    _tagged(
        "Gemma", "<start_of_turn>@\n", "<end_of_turn>\n", ("<start_of_turn>", "<end_of_turn>"), "model", system="user"
    ),
    _tagged("Phi-3", "<|@|>\n", "<|end|>\n", ("<|end|>", "<|user|>", "<|assistant|>")),
    _tagged("Zephyr", "<|@|>\n", "</s>\n", ("</s>", "<|user|>", "<|assistant|>")),
    Format("Mistral", "[INST] {}[/INST]", " {}</s>", "[INST] {}[/INST]", "", _INST),
    Format("Llama 2", "<s>[INST] {} [/INST]", " {} </s>", "<s>[INST] {} [/INST]", "", _INST),
)

#: Limits of the process that renders a template: seconds of CPU time, bytes of memory.
_SECONDS, _MEMORY = 10, 1 << 30
_ASKED = ({"role": "user", "content": "Quis?"},)
_TWICE = (*_ASKED, {"role": "assistant", "content": "Ego."}, {"role": "user", "content": "Quando?"})
_SYSTEM = {"role": "system", "content": "Esto brevis."}


@dataclass(frozen=True, slots=True)
class Known:
    """A format, and the system message that the template adds by itself."""

    format: Format
    system: str | None


def recognise(template: str, special: Mapping[str, str]) -> Known | None:
    """The format of a chat template, or None. ``special`` are the texts of special tokens: ``bos_token``, …

    A template is an untrusted program: it runs in Jinja's sandbox, in a process with limits of time and memory.
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
    # These quotes end a text in the Modelfile. A template could add any command after them.
    if found is None or '"""' in (found["system"] or ""):
        return None
    return Known(FORMATS[found["format"]], found["system"])


def _tried_out(template: str, special: Mapping[str, str]) -> Known | None:
    compiled = _compiled(template)

    def rendered(messages: Sequence[Message]) -> str | None:
        """A conversation up to the answer; None if the template refuses it."""
        try:
            return str(compiled.render(messages=messages, add_generation_prompt=True, **special))
        except Exception:  # a template may raise anything
            return None

    asked, twice = rendered(_ASKED), rendered(_TWICE)
    if compiled is None or asked is None or twice is None:
        return None
    for format_ in FORMATS:
        start, end = asked.find(format_.render(_ASKED)), format_.render(_ASKED)
        if start < 0 or not asked.endswith(end) or twice != asked[:start] + format_.render(_TWICE):
            continue
        # The tokenizer, too, adds the token that begins a text.
        said, bos = asked[:start], special.get("bos_token", "")
        if said in ("", bos):
            return Known(format_, None)
        # Any other text before the first turn must be a system message, or Ollama could not express it.
        before, _, after = format_.system.partition("{}")
        system = rendered((_SYSTEM, *_ASKED))
        speaks = system is not None and system.endswith(format_.render((_SYSTEM, *_ASKED)))
        for text in (said, said.removeprefix(bos)):
            if speaks and text.startswith(before) and text.endswith(after):
                return Known(format_, text[len(before) : len(text) - len(after)])
    return None


def _compiled(template: str) -> Any:
    """A chat template in Jinja's sandbox, with transformers' functions; None if it cannot be compiled."""
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
    """The Modelfile for a GGUF file with these key-values beside it.

    ``contents`` are the small files that the GGUF file was made from: tokenizer_config.json names the special tokens.
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
    """Run a template, in a process of its own. Print the format's index in `FORMATS` and the system message."""
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    given = json.loads(sys.stdin.read())
    known = _tried_out(given["template"], given["special"])
    print(json.dumps(known and {"format": FORMATS.index(known.format), "system": known.system}))


if __name__ == "__main__":
    main()
