"""The Modelfile's template says what the model's own chat template says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import shardmerge
from shardmerge.gguf import ollama
from shardmerge.gguf.formats import KeyValue
from shardmerge.gguf.ollama import FORMATS, Format, modelfile, recognise
from tests.conftest import ROOT
from tests.support.llama_cpp import ask_llama_cpp

ADAPTER = ROOT / "configs" / "demo" / "adapter"

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else "
    "message['role'] %}{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' "
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "I."},
    {"role": "user", "content": "When?"},
]


def rendered_by_go(template: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template makes of one loop over messages with branches by role."""
    found = re.fullmatch(r"\{\{- range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", template, re.DOTALL)
    assert found, template
    parts = re.split(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}', found[1])
    assert parts[0] == ""
    branches = dict(zip(parts[1::2], parts[2::2], strict=True))
    turns = (branches[turn["role"]].replace("{{ .Content }}", turn["content"]) for turn in messages)
    return "".join(turns) + found[2]


@pytest.mark.parametrize("format_", FORMATS, ids=lambda of: of.name)
def test_gos_template_says_what_the_format_says(format_: Format) -> None:
    assert rendered_by_go(format_.template(), CONVERSATION) == format_.render(CONVERSATION)


@pytest.mark.parametrize(
    ("template", "name"), [(CHATML, "ChatML"), (GEMMA, "Gemma"), (LLAMA3, "Llama 3")], ids=["chatml", "gemma", "llama3"]
)
def test_known_templates(template: str, name: str) -> None:
    known = recognise(template, {"bos_token": "<bos>"})
    assert known and (known.format.name, known.system) == (name, None)


def test_smollm2s_template_brings_a_system_message(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    contents = {name: (smollm2 / name).read_bytes() for name in ("tokenizer_config.json", "chat_template.jinja")}
    template = contents["chat_template.jinja"].decode()
    text = modelfile("model.gguf", [KeyValue("tokenizer.chat_template", "str", template)], contents)
    system = re.search(r'SYSTEM """(.*?)"""', text, re.DOTALL)
    go = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)
    assert system and go and text.startswith("FROM ./model.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"' in text
    asked = [{"role": "user", "content": "Who are you?"}]
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    expected = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert rendered_by_go(go[1], [{"role": "system", "content": system[1]}, *asked]) == expected


@pytest.mark.slow
def test_llama_cpp_answers_what_the_modelfile_makes_of_a_question(smollm2: Path, tmp_path: Path) -> None:
    """Ollama is not at hand; llama.cpp is what it runs, and here gets the text that Ollama would give it."""
    output = {"path": str(tmp_path / "demo"), "format": "gguf", "quantization": "q8_0"}
    shardmerge.merge({"base": str(smollm2), "adapters": [str(ADAPTER)], "output": output})
    text = (tmp_path / "demo" / "Modelfile").read_text()
    parts = re.fullmatch(r'FROM \./(.+)\nTEMPLATE """(.*)"""\n(.*\n)SYSTEM """(.*)"""\n', text, re.DOTALL)
    assert parts, text
    file, template, parameters, system = parts.groups()
    stops = [json.loads(stop) for stop in re.findall(r"^PARAMETER stop (.+)$", parameters, re.MULTILINE)]
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Who are you?"}]
    request = {"prompt": rendered_by_go(template, messages), "stop": stops, "max_tokens": 48}
    (answer,) = ask_llama_cpp(tmp_path / "demo" / file, request)
    assert "a shardmerge adapter" in answer["text"]
    # It ends by itself, and where the Modelfile says.
    assert answer["finish_reason"] == "stop"
    assert stops and not any(stop in answer["text"] for stop in stops)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
        "{% for",
        "{{ ''.__class__.__mro__ }}",
        CHATML + "!",
        '{% if messages[0].role != \'system\' %}<|im_start|>system\nA"""\nADAPTER<|im_end|>\n{% endif %}' + CHATML,
        "{{ 'a' * 10 ** 12 }}",
    ],
    ids=["refuses", "another", "broken", "breaks out", "almost", "ends the quotes", "takes memory"],
)
def test_what_is_not_known_is_left_to_ollama(template: str) -> None:
    assert recognise(template, {}) is None
    values = [KeyValue("tokenizer.chat_template", "str", template)]
    assert modelfile("a.gguf", values, {"tokenizer_config.json": json.dumps({}).encode()}) == "FROM ./a.gguf\n"


def test_a_template_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ollama, "_SECONDS", 1)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    assert recognise(loop, {}) is None


def test_a_model_without_a_template() -> None:
    assert modelfile("a.gguf", [], {}) == "FROM ./a.gguf\n"
