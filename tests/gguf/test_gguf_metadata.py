"""Key-values where no real tokenizer leads, and files that are broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shardmerge.gguf.files import ModelFiles, wanted
from shardmerge.gguf.layout import lay_out
from shardmerge.gguf.metadata import LEFT_OUT, Description, _rounded, describe
from shardmerge.gguf.model import read_model
from shardmerge.gguf.sentencepiece import Piece, read_pieces
from shardmerge.gguf.special_tokens import read_special_tokens
from tests.support.gguf_oracle import Converter, shared_converter
from tests.support.gguf_shapes import LLAMA, SHAPES, refs
from tests.support.gguf_zoo import spm_model


def encoded(files: dict[str, Any]) -> dict[str, bytes]:
    return {
        name: content
        if isinstance(content, bytes)
        else content.encode(errors="surrogatepass")
        if isinstance(content, str)
        else json.dumps(content).encode()
        for name, content in files.items()
    }


def described(files: dict[str, Any], **config: Any) -> Description:
    settings = {**LLAMA, "vocab_size": 384, **config}
    model, problems = read_model(settings)
    assert model, problems
    layout = lay_out(model, [refs(SHAPES | {"model.embed_tokens.weight": (384, 64)})], "Q8_0")
    contents = encoded({"config.json": settings, **files})
    return describe(model, layout, "Q8_0", contents, "Model")


def value(description: Description, key: str) -> Any:
    return next((item.value for item in description.values if item.key == key), None)


@pytest.fixture(scope="session")
def converter() -> Converter:
    return shared_converter()


# --- special tokens ---------------------------------------------------------------------------------------------------

_ADDED = [{"id": index, "content": text} for index, text in enumerate(("<unk>", "<s>", "</s>", "<eot>", "<pad>"))]


def _post(single: list[str], pair: list[str] | None = None) -> dict[str, Any]:
    def pieces(names: list[str]) -> list[dict[str, Any]]:
        return [
            {"Sequence": {"id": name, "type_id": 0}} if name in "AB" else {"SpecialToken": {"id": name, "type_id": 0}}
            for name in names
        ]

    return {"type": "TemplateProcessing", "single": pieces(single), "pair": pieces(pair or [])}


SPECIAL: dict[str, dict[str, Any]] = {
    "nothing": {},
    "config alone": {"config.json": {"bos_token_id": 1, "eos_token_id": [2, 3], "sep_token_id": 7}},
    "in the text config": {"config.json": {"text_config": {"bos_token_id": 1}, "eos_token_id": 2}},
    "by text": {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<no>"}},
    "by text first": {
        "tokenizer_config.json": {"bos_token": "<eot>", "unk_token": "<unk>"},
        "config.json": {"bos_token_id": 1, "unk_token_id": 4},
    },
    "flags": {"tokenizer_config.json": {"add_bos_token": True, "add_eos_token": False, "add_pad_token": True}},
    "template adds the beginning": {
        "post": _post(["<s>", "A"], ["<s>", "A", "<s>", "B"]),
        "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>"},
    },
    "template adds both": {
        "post": _post(["<s>", "A", "</s>"], ["<s>", "A", "</s>", "B", "</s>"]),
        "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>"},
    },
    "template adds another end": {
        "post": _post(["<s>", "A", "<eot>"]),
        "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>"},
    },
    "template with a beginning that is none": {
        "post": _post(["<eot>", "A"]),
        "tokenizer_config.json": {"bos_token": "<s>"},
    },
    "template without settings": {"post": _post(["<s>", "A", "</s>"])},
    "template among others": {
        "post": {"type": "Sequence", "processors": [{"type": "ByteLevel"}, _post(["<s>", "A"], ["<s>", "A", "B"])]},
        "tokenizer_config.json": {"bos_token": "<s>", "add_bos_token": False},
    },
    "separators": {
        "post": _post(["A", "</s>"], ["A", "</s>", "</s>", "B", "</s>"]),
        "tokenizer_config.json": {"eos_token": "</s>"},
    },
    "normaliser": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}},
    "accents": {"normalizer": {"type": "StripAccents"}},
    "template in the settings": {"tokenizer_config.json": {"chat_template": "a"}, "chat_template.jinja": "b"},
    "template beside": {"tokenizer_config.json": {}, "chat_template.jinja": "b\r\nc"},
    "template in JSON": {"tokenizer_config.json": {}, "chat_template.json": {"chat_template": "c"}},
    "template without settings file": {"chat_template.jinja": "b"},
    "several templates": {
        "tokenizer_config.json": {
            "chat_template": [{"name": "default", "template": "d"}, {"name": "tool use", "template": "t"}]
        }
    },
    "several templates beside": {
        "tokenizer_config.json": {},
        "chat_template.jinja": "b",
        "additional_chat_templates/tools.jinja": "t",
    },
    "no default template": {"tokenizer_config.json": {"chat_template": [{"name": "x", "template": "t"}]}},
}


@pytest.mark.parametrize("case", SPECIAL)
@pytest.mark.parametrize("limit", [None, 3])
def test_special_tokens_are_those_of_the_converter(
    case: str, limit: int | None, converter: Converter, tmp_path: Path
) -> None:
    files = dict(SPECIAL[case])
    tokenizer = {"added_tokens": _ADDED, "model": {}, "post_processor": files.pop("post", None)}
    tokenizer["normalizer"] = files.pop("normalizer", None)
    contents = encoded({"tokenizer.json": tokenizer, **files})
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    theirs = converter.special_tokens(tmp_path, limit)
    problems: list[str] = []
    ours = read_special_tokens(ModelFiles(contents, problems), limit)
    assert not problems
    assert list(ours.ids.items()) == list(theirs["ids"].items())
    assert list(ours.adds.items()) == list(theirs["adds"].items())
    template = theirs["template"]
    if isinstance(template, list):
        template = tuple((item["name"], item["template"]) for item in template)
    assert ours.template == template
    assert (ours.lowercases, ours.strips_accents) == (theirs["lowercases"], theirs["strips_accents"])


def test_several_templates_have_keys_of_their_own() -> None:
    files = ModelFiles(encoded(SPECIAL["several templates"]), [])
    found = {item.key: item.value for item in read_special_tokens(files).key_values()}
    assert found == {
        "tokenizer.chat_template.tool_use": "t",
        "tokenizer.chat_templates": ("tool_use",),
        "tokenizer.chat_template": "d",
    }


# --- SentencePiece ----------------------------------------------------------------------------------------------------


def test_pieces_are_those_of_sentencepiece() -> None:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=spm_model())
    pieces = read_pieces(spm_model())
    assert len(pieces) == processor.vocab_size()
    for index, piece in enumerate(pieces):
        assert piece.text.decode() == processor.IdToPiece(index)
        assert piece.score == processor.GetScore(index)
        kinds = (processor.IsUnknown, processor.IsControl, processor.IsUnused, processor.IsByte)
        assert (piece.kind == 2, piece.kind == 3, piece.kind == 5, piece.kind == 6) == tuple(
            is_(index) for is_ in kinds
        )
    assert {piece.kind for piece in pieces} == {1, 2, 3, 4, 6}


@pytest.mark.parametrize(
    "content", [b"", b"\x0a", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\xff" * 40, b"{}"]
)
def test_broken_models_are_told(content: bytes) -> None:
    with pytest.raises(ValueError):
        read_pieces(content)
    (problem,) = described({"tokenizer.model": content}).problems
    assert "tokenizer.model is not a SentencePiece model" in problem


def test_a_piece_without_score_and_type_is_normal() -> None:
    assert read_pieces(b"\x0a\x03\x0a\x01x") == [Piece(b"x", 0.0, 1)]


def test_cut_models_do_no_harm() -> None:
    model = spm_model()
    for end in range(0, 4000, 7):
        try:
            read_pieces(model[:end])
        except ValueError:
            continue


# --- all of it --------------------------------------------------------------------------------------------------------


def test_the_order_and_some_values() -> None:
    description = described({"tokenizer.model": spm_model(), "generation_config.json": {"temperature": 1, "top_k": 5}})
    assert not description.problems
    keys = [item.key for item in description.values]
    assert keys[:6] == [
        "general.architecture",
        "general.type",
        "general.sampling.top_k",
        "general.sampling.temp",
        "general.name",
        "general.size_label",
    ]
    assert value(description, "general.file_type") == 7
    assert value(description, "general.quantization_version") == 2
    assert len(value(description, "tokenizer.ggml.tokens")) == 384
    assert not set(keys) & set(LEFT_OUT)


@pytest.mark.parametrize(
    ("files", "config", "message"),
    [
        ({}, {}, "no tokenizer.json and no tokenizer.model"),
        ({"tokenizer.json": "{"}, {}, "tokenizer.json is not JSON"),
        ({"tokenizer.json": "[]"}, {}, "tokenizer.json is not a JSON object"),
        ({"tokenizer.json": {"model": {"type": "BPE"}}}, {}, "tokenizer.json cannot be used"),
        ({"tokenizer.model": b""}, {"vocab_size": 32016}, "CodeLlama"),
        ({"tokenizer.model": spm_model(), "generation_config.json": {"top_k": "5"}}, {}, "top_k is '5'"),
        ({"tokenizer.model": spm_model(), "tokenizer_config.json": "\x00"}, {}, "tokenizer_config.json is not JSON"),
    ],
)
def test_what_is_wrong_with_files_is_told(files: dict[str, Any], config: dict[str, Any], message: str) -> None:
    problems = described(files, **config).problems
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [("Gemma2ForCausalLM", "gemma2"), ("Gemma3ForCausalLM", "gemma3_text"), ("Phi3ForCausalLM", "phi3")],
)
def test_models_of_sentencepiece_need_its_model(architecture: str, model_type: str) -> None:
    description = described({"tokenizer.json": {}}, architectures=[architecture], model_type=model_type)
    assert "tokenizer.model is missing" in description.problems[0]


def _bpe(vocab: dict[str, int], **changes: Any) -> dict[str, Any]:
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
        **changes,
    }


def test_a_pre_tokenizer_that_was_not_tested_is_refused_by_name() -> None:
    (problem,) = described({"tokenizer.json": _bpe({"a": 0, "b": 1})}).problems
    assert "(unknown) is none of those that were tested for LlamaForCausalLM (llama-bpe, smaug-bpe, smollm)" in problem


def test_a_tested_pre_tokenizer_of_another_architecture_is_refused_too(smollm2: Path) -> None:
    files = {"tokenizer.json": (smollm2 / "tokenizer.json").read_bytes()}
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 49152}
    (problem,) = described(files, **config).problems
    assert "(smollm) is none of those that were tested for Qwen2ForCausalLM (qwen2)" in problem


def test_a_vocabulary_that_is_too_large_or_lacks_a_token_is_told(smollm2: Path) -> None:
    files = {"tokenizer.json": (smollm2 / "tokenizer.json").read_bytes()}
    (problem,) = described(files, vocab_size=49000).problems
    assert "the tokenizer has ids up to 49151; config.json's vocab_size is 49000" in problem
    files["tokenizer_config.json"] = b'{"pad_token": "<nowhere>"}'
    (problem,) = described(files, vocab_size=49152).problems
    assert "pad_token is '<nowhere>', which tokenizer.json does not have" in problem


def test_byte_fallback_without_scores_warns_and_must_fill_the_embedding() -> None:
    vocab = {f"t{index}": index for index in range(300)} | {"<0x0A>": 300, "<unk>": 301}
    tokenizer = _bpe(vocab, decoder={"type": "Sequence", "decoders": []})
    tokenizer["model"]["byte_fallback"] = True
    description = described({"tokenizer.json": tokenizer}, vocab_size=302)
    assert not description.problems
    assert "scores are not in tokenizer.json" in description.warnings[0]
    assert value(description, "tokenizer.ggml.token_type")[-2:] == (6, 3)
    assert "302 tokens and config.json's vocab_size is 384" in described({"tokenizer.json": tokenizer}).problems[0]


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (problem,) = described({"tokenizer.json": _bpe({"a": 0})}).problems
    assert "pip install tokenizers" in problem


def test_files_that_are_asked_for() -> None:
    names = [
        "model.safetensors",
        "README.md",
        "tokenizer.json",
        "config.json",
        "additional_chat_templates/x.jinja",
        "x.jinja",
    ]
    assert wanted(names) == ["additional_chat_templates/x.jinja", "config.json", "tokenizer.json"]


@pytest.mark.parametrize(
    "count", [1, 999, 123_456, 999_999, 1_000_001, 8_030_261_248, 46_702_792_704, 1_500_000_000_000]
)
def test_sizes_are_rounded_as_the_package_does(count: int) -> None:
    from gguf.utility import model_weight_count_rounded_notation

    assert _rounded(count) == model_weight_count_rounded_notation(count)


# --- files of strangers -----------------------------------------------------------------------------------------------

_ODD: list[Any] = [None, True, -1, 10**30, 1e300, "", "x", "\ud800", [], [[]], {}, {"x": {}}, ["x", 1]]


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in _places(item, (*path, key)))]


def _with(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _with(value[path[0]], path[1:], new)
    return copy


def _llama_files() -> dict[str, Any]:
    """A tokenizer.json of byte fallback, and all that may lie beside it."""
    tokenizer = _bpe({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, decoder={"type": "Sequence", "decoders": []})
    tokenizer["model"]["byte_fallback"] = True
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}
    tokenizer["added_tokens"] = [{"id": 4, "content": "<eot>", "special": True}]
    tokenizer["post_processor"] = _post(["<s>", "A", "</s>"], ["<s>", "A", "</s>", "B", "</s>"])
    settings = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "extra_special_tokens": ["<eot>"],
        "add_bos_token": True,
        "add_prefix_space": True,
        "chat_template": [{"name": "default", "template": "d"}],
        "added_tokens_decoder": {"4": {"content": "<eot>", "special": True}},
    }
    return {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": settings,
        "generation_config.json": {"temperature": 0.5, "top_k": 3},
        "added_tokens.json": {"<x>": 5},
    }


@pytest.mark.parametrize("name", _llama_files())
@pytest.mark.parametrize("with_model", [False, True])
def test_odd_values_anywhere_do_no_harm(name: str, with_model: bool) -> None:
    files = _llama_files() | ({"tokenizer.model": spm_model()} if with_model else {})
    for path in _places(files[name]):
        for odd in _ODD:
            described(files | {name: _with(files[name], path, odd)}, vocab_size=5)


def test_odd_values_in_a_config_do_no_harm() -> None:
    scaling = {"rope_type": "longrope", "factor": 2.0, "long_factor": [1.0] * 8, "short_factor": [1.0] * 8}
    parameters = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    for architecture, model_type, more in (
        ("LlamaForCausalLM", "llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}),
        (
            "Gemma3ForConditionalGeneration",
            "gemma3_text",
            {"rope_parameters": parameters, "text_config": {"head_dim": 8}},
        ),
        ("Phi3ForCausalLM", "phi3", {"rope_scaling": scaling, "original_max_position_embeddings": 8}),
        ("Qwen3MoeForCausalLM", "qwen3_moe", {"num_experts": 4}),
    ):
        config = {**LLAMA, "architectures": [architecture], "model_type": model_type, **more}
        for path in _places(config):
            for odd in _ODD:
                changed = _with(config, path, odd)
                if not isinstance(changed, dict):
                    continue
                model, problems = read_model(changed)
                assert (model is None) == bool(problems)
                if model:
                    layout = lay_out(model, [refs(SHAPES)], "Q4_0")
                    describe(model, layout, "Q4_0", {"tokenizer.model": spm_model()}, "x")
