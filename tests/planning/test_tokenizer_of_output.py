"""The merged model's tokenizer, as transformers loads it: the adapter's or the base's, never one made of both.

The oracle is `AutoTokenizer` on a folder that has the adapter's files and the model's config.json, and nothing else.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import shardmerge
from shardmerge.planning.tokenizer import is_tokenizer
from shardmerge.spec.plans import MergePlan
from tests.support.builders import Place, make_place, write_json, write_peft
from tests.support.tokenizers_zoo import KINDS, byte_level, word_level, write_tokenizer

CHAT = [{"role": "user", "content": "hello w1 w2"}]
TEXT = "hello w1 w2 a few words"


def template(name: str) -> str:
    return name + " {{ messages[0]['content'] }}"


#: What wins over a tokenizer's own files or mixes with it, all of it at once.
OF_BASE = {
    "special_tokens_map.json": json.dumps({"eos_token": "w3", "pad_token": "w3", "bos_token": "w4"}),
    "added_tokens.json": json.dumps({"<|base|>": 70}),
    "chat_template.jinja": template("BASE"),
    "chat_template.json": json.dumps({"chat_template": template("BASE PROCESSOR")}),
    "additional_chat_templates/tool.jinja": template("BASE TOOL"),
    "tokenizer.model.v3": "base",
    "tekken.json": "{}",
}
#: Where an adapter's template is.
TEMPLATES: Mapping[str, Callable[[Path], None]] = {
    "none": lambda folder: None,
    "inline": lambda folder: change(folder / "tokenizer_config.json", chat_template=template("ADAPTER")),
    "file": lambda folder: write(folder, "chat_template.jinja", template("ADAPTER")),
    "several": lambda folder: write_all(
        folder,
        {
            "chat_template.jinja": template("ADAPTER"),
            "additional_chat_templates/rag.jinja": template("ADAPTER RAG"),
        },
    ),
    "named inline": lambda folder: change(
        folder / "tokenizer_config.json",
        chat_template=[
            {"name": "default", "template": template("ADAPTER")},
            {"name": "rag", "template": template("ADAPTER RAG")},
        ],
    ),
}


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def write_all(folder: Path, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        write(folder, name, text)


def change(path: Path, **values: Any) -> None:
    write_json(path, {**json.loads(path.read_text()), **values})


def small_place(folder: Path) -> Place:
    return make_place(folder, aux={}, shards=1)


def laid_out(plan: MergePlan, folder: Path) -> Path:
    """The files beside the weights, as the merge writes them."""
    for aux in plan.aux:
        (folder / aux.name).parent.mkdir(parents=True, exist_ok=True)
        (folder / aux.name).write_bytes(
            Path(aux.source.uri).read_bytes() if aux.content is None else aux.content.encode()
        )
    return folder


def reference(adapter: Path, base: Path, folder: Path) -> Path:
    """The adapter's folder without the adapter, and with the model's config.json: its tokenizer and nothing else."""
    shutil.copytree(adapter, folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink(missing_ok=True)
    shutil.copy(base / "config.json", folder)
    return folder


def facts(folder: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(folder)
    rendered = found.apply_chat_template(CHAT, tokenize=False) if found.chat_template else None
    return {
        "class": type(found).__name__,
        "special": {key: str(value) for key, value in found.special_tokens_map.items()},
        "ids": [found.eos_token_id, found.pad_token_id, found.bos_token_id],
        "vocabulary": found.get_vocab(),
        "added": {number: str(token) for number, token in found.added_tokens_decoder.items()},
        "templates": found.chat_template,
        "chat": rendered,
        "text": found(TEXT)["input_ids"],
    }


#: Of each kind, itself and one other; the rest are slow.
PAIRS = [
    pytest.param(one, other, marks=[] if (second - first) % len(KINDS) < 2 else [pytest.mark.slow])
    for (first, one), (second, other) in itertools.product(enumerate(KINDS), repeat=2)
]


# --- whole, from the adapter ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("of_base", "of_adapter"), PAIRS)
def test_adapter_brings_a_tokenizer(tmp_path: Path, of_base: str, of_adapter: str) -> None:
    """Every kind in place of every kind, with all that a base can have beside it; the template in each place once."""
    place = small_place(tmp_path)
    write_tokenizer(place.base, KINDS[of_base][0](), KINDS[of_base][2], "</s>", OF_BASE)
    write_tokenizer(place.adapter, KINDS[of_adapter][1](), KINDS[of_adapter][2], "<|end|>")
    kinds = list(KINDS)
    where = list(TEMPLATES)[(kinds.index(of_base) + kinds.index(of_adapter)) % len(TEMPLATES)]
    TEMPLATES[where](place.adapter)
    plan = shardmerge.plan(place.config())
    expected = facts(reference(place.adapter, place.base, tmp_path / "reference"))
    assert facts(laid_out(plan, tmp_path / "laid out")) == expected
    assert expected["special"]["eos_token"] == "<|end|>"
    assert (expected["chat"] or "ADAPTER").startswith("ADAPTER")
    (note,) = (warning for warning in plan.warnings if "the tokenizer is the one of adapter" in warning)
    left = {name for name in OF_BASE if not (place.adapter / name).exists()}
    assert all(name in note for name in left)
    assert not left & {aux.name for aux in plan.aux}


@pytest.mark.parametrize("where", TEMPLATES)
def test_saved_by_transformers(tmp_path: Path, where: str) -> None:
    """What `save_pretrained` writes today, into both folders, and a whole merge."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    place = small_place(tmp_path)
    for folder, eos in ((place.base, "</s>"), (place.adapter, "<|end|>")):
        made = Tokenizer.from_str(str(word_level()["tokenizer.json"]))
        PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos, pad_token=eos).save_pretrained(folder)
    write(place.base, "special_tokens_map.json", OF_BASE["special_tokens_map.json"])
    write(place.base, "chat_template.jinja", OF_BASE["chat_template.jinja"])
    TEMPLATES[where](place.adapter)
    shardmerge.merge(place.config())
    assert facts(place.output) == facts(reference(place.adapter, place.base, tmp_path / "reference"))
    assert shardmerge.verify(place.output).raise_for_status().complete


def test_a_base_without_a_tokenizer_gets_one(tmp_path: Path) -> None:
    place = small_place(tmp_path)
    write_tokenizer(place.adapter, word_level(), "PreTrainedTokenizerFast", "</s>")
    plan = shardmerge.plan(place.config())
    assert facts(laid_out(plan, tmp_path / "out")) == facts(reference(place.adapter, place.base, tmp_path / "x"))
    assert not [warning for warning in plan.warnings if "tokenizer" in warning]


def test_tokenizer_without_a_vocabulary(tmp_path: Path) -> None:
    """ByT5 spells bytes: its config is all that it has, on both sides."""
    place = small_place(tmp_path)
    for folder, eos in ((place.base, "</s>"), (place.adapter, "<|end|>")):
        write_tokenizer(folder, {}, "ByT5Tokenizer", eos)
    write(place.base, "special_tokens_map.json", json.dumps({"eos_token": "</s>"}))
    plan = shardmerge.plan(place.config())
    found = facts(laid_out(plan, tmp_path / "out"))
    assert found == facts(reference(place.adapter, place.base, tmp_path / "reference"))
    assert found["special"]["eos_token"] == "<|end|>"


def test_the_first_adapter_that_has_a_whole_one(tmp_path: Path) -> None:
    place = small_place(tmp_path)
    write_tokenizer(place.base, word_level(), "PreTrainedTokenizerFast", "</s>", OF_BASE)
    adapters = [write_peft(tmp_path / name) for name in ("template", "first", "second")]
    write(adapters[0], "chat_template.jinja", template("TEMPLATE"))
    write_tokenizer(adapters[1], byte_level(), "PreTrainedTokenizerFast", "<|end|>")
    write_tokenizer(adapters[2], word_level(), "PreTrainedTokenizerFast", "<pad>")
    plan = shardmerge.plan(place.config(adapters=[str(path) for path in adapters]))
    assert facts(laid_out(plan, tmp_path / "out")) == facts(reference(adapters[1], place.base, tmp_path / "reference"))
    notes = "\n".join(warning for warning in plan.warnings if "left out" in warning)
    assert f"adapter {adapters[0]} has files of a tokenizer that are left out: chat_template.jinja" in notes
    assert f"adapter {adapters[2]}" in notes
    assert "another adapter's is taken" in notes


# --- a template alone, and what is not a whole tokenizer --------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["inline", "file", "several"])
def test_a_template_alone_takes_the_place_of_the_base_s(tmp_path: Path, kind: str, where: str) -> None:
    place = small_place(tmp_path)
    more = {name: text for name, text in OF_BASE.items() if name.endswith("s_map.json")}
    write_tokenizer(place.base, KINDS[kind][0](), KINDS[kind][2], "</s>", more)
    before = facts(place.base)
    TEMPLATES[where](place.base)
    write(place.base, "processor_config.json", json.dumps({"x": 1, "chat_template": "OLD"}))
    write(place.adapter, "chat_template.jinja", template("MINE"))
    out = laid_out(shardmerge.plan(place.config()), tmp_path / "out")
    assert facts(out) == {**before, "templates": template("MINE"), "chat": "MINE hello w1 w2"}
    # Programs that read the template in the config do not find the base's there.
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
    assert json.loads((out / "processor_config.json").read_text()) == {"x": 1}


@pytest.mark.parametrize(
    "files",
    [
        {"special_tokens_map.json": '{"eos_token": "w5"}'},
        {"added_tokens.json": '{"<x>": 99}', "tokenizer_config.json": "{}"},
        {"merges.txt": "#version: 0.2\na b\n"},
        {"vocab.json": "{}", "tokenizer_config.json": "{}"},
        {"additional_chat_templates/tool.jinja": "x"},
    ],
    ids=["map", "settings", "merges alone", "vocabulary without merges", "a template for tools alone"],
)
def test_what_is_not_whole_is_left_out_and_named(tmp_path: Path, files: dict[str, str]) -> None:
    place = small_place(tmp_path)
    write_tokenizer(place.base, byte_level(), "GPT2Tokenizer", "</s>")
    before = facts(place.base)
    for name, text in files.items():
        write(place.adapter, name, text)
    plan = shardmerge.plan(place.config())
    assert facts(laid_out(plan, tmp_path / "out")) == before
    (note,) = (warning for warning in plan.warnings if "left out" in warning)
    assert all(name in note for name in files)


def test_a_copy_of_the_vocabulary_alone_changes_nothing(tmp_path: Path) -> None:
    place = small_place(tmp_path)
    write_tokenizer(place.base, byte_level(), "GPT2Tokenizer", "</s>", {"chat_template.jinja": template("BASE")})
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        shutil.copy(place.base / name, place.adapter)
    plan = shardmerge.plan(place.config())
    assert facts(laid_out(plan, tmp_path / "out")) == facts(place.base)
    assert not [warning for warning in plan.warnings if "left out" in warning]


def test_processors_stay_the_base_s(tmp_path: Path) -> None:
    place = small_place(tmp_path)
    write_tokenizer(place.adapter, word_level(), "PreTrainedTokenizerFast", "</s>")
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        write(place.base, name, '{"of": "base"}')
        write(place.adapter, name, '{"of": "adapter"}')
    found = {aux.name: (aux.source.uri, aux.content) for aux in shardmerge.plan(place.config()).aux}
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        assert found[name] == (str(place.base / name), None)


def test_code_of_a_tokenizer_comes_with_it_and_is_named(tmp_path: Path) -> None:
    place = small_place(tmp_path)
    write(place.base, "tokenization_base.py", "x")
    write_tokenizer(place.adapter, word_level(), "MyTokenizer", "</s>", {"tokenization_mine.py": "y"})
    plan = shardmerge.plan(place.config())
    assert {"tokenization_base.py", "tokenization_mine.py"} <= {aux.name for aux in plan.aux}
    assert [warning for warning in plan.warnings if "its code: tokenization_mine.py" in warning]


# --- files that are not there -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("whose", ["base", "adapter"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_pointer_is_no_tokenizer(tmp_path: Path, whose: str, name: str) -> None:
    place = small_place(tmp_path)
    write_tokenizer(getattr(place, whose), {name: "version https://git-lfs.github.com/spec/v1\noid x\n"}, "X", "</s>")
    with pytest.raises(shardmerge.PlanError, match=f"Git LFS pointers: {name}"):
        shardmerge.plan(place.config())


# --- every class ------------------------------------------------------------------------------------------------------


def vocabulary_files() -> set[str]:
    """The names of every file that a tokenizer class of transformers reads."""
    import transformers

    found: set[str] = set()
    for name in dir(transformers):
        if name.endswith(("Tokenizer", "TokenizerFast")):
            try:
                found |= set((getattr(getattr(transformers, name), "vocab_files_names", None) or {}).values())
            except ImportError:
                continue  # its library is not there
    return found


def test_every_file_that_a_tokenizer_reads_is_one_of_a_tokenizer() -> None:
    names = vocabulary_files()
    assert len(names) > 20
    assert [name for name in sorted(names) if not is_tokenizer(name)] == []


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "preprocessor_config.json", "README.md", "a/tokenizer.json", "x.py"],
)
def test_other_files_are_not(name: str) -> None:
    assert not is_tokenizer(name)
