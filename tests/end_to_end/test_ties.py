"""Every class of transformers that ties weights: untied, the merged model is base + adapter as PEFT loads them.

Every parameter in memory is compared, and what the model answers wherever it can be asked with numbers of ours.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import shardmerge
from shardmerge import PlanError

pytest.importorskip("transformers.conversion_mapping")
pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from tests.support import ties_zoo as zoo  # noqa: E402
from tools import bake_names  # noqa: E402

BAKED = json.loads(bake_names.TARGET.read_text())
pytestmark = [
    pytest.mark.skipif(
        transformers.__version__ != BAKED["transformers"],
        reason=f"the table is of transformers {BAKED['transformers']}",
    ),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def quiet() -> None:
    bake_names.quiet()
    transformers.logging.disable_progress_bar()


def merged(folder: Path, **config: Any) -> Path:
    shardmerge.merge(
        {
            "base": str(folder / "base"),
            "adapters": [str(folder / "adapter")],
            "output": {"path": str(folder / "out")},
            **config,
        }
    )
    return folder / "out"


def differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Parameters that one of the two lacks or has with other numbers, but for the rounding of one sum."""
    apart = sorted(found.keys() ^ wanted.keys())
    shared = found.keys() & wanted.keys()
    return apart + [name for name in shared if not torch.allclose(found[name], wanted[name], rtol=0, atol=1e-5)]


def is_answer(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) and all(
        torch.allclose(one, other, rtol=0, atol=1e-3 * float(other.abs().max()) + 1e-6, equal_nan=True)
        for one, other in zip(found, wanted, strict=True)
    )


def class_of(name: str) -> Any:
    return getattr(transformers, name, None) or bake_names.classes()[name]


def outcome(name: str, folder: Path) -> str:
    """What becomes of a class: "" where the merged model computes the same, else what stands in the way."""
    cls = class_of(name)
    try:
        zoo.build(cls, folder / "base")
    except zoo.CannotBuildError:
        return "not built"
    base = zoo.load(cls, folder / "base")
    modules = zoo.pair(base)
    if not modules:
        return "no LoRA"
    try:
        with_bias = {"lora_bias": True} if len(modules) == 1 else {}
        zoo.train(zoo.load(cls, folder / "base"), modules, folder / "adapter", **with_bias)
    except Exception:  # whatever PEFT raises
        return "not trained"
    wrapped = zoo.attach(base, folder / "adapter")
    if not zoo.found_back(wrapped, folder / "adapter"):
        return "not found back"
    try:
        out = merged(folder, tied="untie")
    except PlanError:
        return "refused"
    model = zoo.load(cls, out)
    wanted = zoo.effective(wrapped)
    if wrong := differences(dict(model.named_parameters(remove_duplicate=False)), wanted):
        return f"wrong: {wrong[:3]}"
    answered = zoo.asked(wrapped)
    if answered is None:
        return "not asked"
    return "" if is_answer(zoo.answer(model, answered[0]), answered[1]) else "other answer"


#: Of classes whose answers cannot be compared: why, and which. One that can be fails the test.
REASONS: dict[str, tuple[str, ...]] = {
    # No small model: too large, for want of a library, or because the rules for sizes do not fit the config.
    "not built": (
        "BltForCausalLM",
        "CsmForConditionalGeneration",
        "DbrxForCausalLM",
        "Dots3NoteForCausalLM",
        "Dots3NoteForConditionalGeneration",
        "Ernie4_5_VLMoeForConditionalGeneration",
        "Ernie4_5_VL_MoeForConditionalGeneration",
        "FastVlmForConditionalGeneration",
        "Florence2ForConditionalGeneration",
        "Gemma3nForCausalLM",
        "Gemma3nForConditionalGeneration",
        "Gemma4AssistantForCausalLM",
        "Glm5NextForConditionalGeneration",
        "JanusForConditionalGeneration",
        "Kimi_K25ForConditionalGeneration",
        "KyutaiSpeechToTextForConditionalGeneration",
        "PeAudioVideoModel",
        "PerceptionLMForConditionalGeneration",
        "Pix2StructTextModel",
        "Qwen3OmniMoeTalkerForConditionalGeneration",
        "Qwen4ExpForCausalLM",
        "Qwen4ExpForConditionalGeneration",
        "VibeVoiceForConditionalGeneration",
        "ZambaModel",
    ),
    # What is tied is not a layer that LoRA can be put on, but a buffer.
    "no LoRA": (
        "SamHQModel",
        "SamModel",
    ),
    # PEFT asks any model that ties something for its input embeddings, and these raise NotImplementedError.
    "not trained": (
        "DFineForObjectDetection",
        "DabDetrForObjectDetection",
        "DeformableDetrForObjectDetection",
        "Deimv2ForObjectDetection",
        "FlavaForPreTraining",
        "GraniteSpeech5ForCTC",
        "GroundingDinoForObjectDetection",
        "MMGroundingDinoForObjectDetection",
        "PPDocLayoutV3Model",
        "ProphetNetDecoderWrapper",
        "RTDetrV2ForObjectDetection",
    ),
    # PEFT does not find back the embedding's factors that it saved: it renames their keys.
    "not found back": (
        "DeepseekOcr2ForConditionalGeneration",
        "UnlimitedOcrForConditionalGeneration",
    ),
    # Cannot be untied (T5 and its like, ViLT, Zamba), or the model's own tie is of two shapes (ImageGPT, Ovis2).
    "refused": (
        "ImageGPTForCausalImageModeling",
        "LongT5EncoderModel",
        "LongT5ForConditionalGeneration",
        "LongT5Model",
        "MT5EncoderModel",
        "MT5ForConditionalGeneration",
        "MT5ForQuestionAnswering",
        "MT5Model",
        "Ovis2ForConditionalGeneration",
        "Pop2PianoForConditionalGeneration",
        "SwitchTransformersEncoderModel",
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersModel",
        "T5EncoderModel",
        "T5ForConditionalGeneration",
        "T5ForQuestionAnswering",
        "T5Model",
        "UMT5EncoderModel",
        "UMT5ForConditionalGeneration",
        "UMT5ForQuestionAnswering",
        "UMT5Model",
        "UdopEncoderModel",
        "UdopForConditionalGeneration",
        "UdopModel",
        "ViltForMaskedLM",
        "Zamba2ForCausalLM",
        "Zamba2Model",
        "ZambaForCausalLM",
    ),
    # All parameters are those of base and adapter, but the small model cannot be run with the test's inputs.
    "not asked": (
        "AXK1ForCausalLM",
        "BarkFineModel",
        "DeepseekV2ForCausalLM",
        "EsmForMaskedLM",
        "Gemma4UnifiedAssistantForCausalLM",
        "Glm46VForConditionalGeneration",
        "Glm4vForConditionalGeneration",
        "Glm4vMoeForConditionalGeneration",
        "GlmOcrForConditionalGeneration",
        "GraniteMoeHybridForCausalLM",
        "HunYuanVLForConditionalGeneration",
        "IdeficsForVisionText2Text",
        "Kosmos2ForConditionalGeneration",
        "LxmertForPreTraining",
        "MoonshineForConditionalGeneration",
        "MoonshineStreamingForConditionalGeneration",
        "PaddleOCRVLForConditionalGeneration",
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5OmniThinkerForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        "SeamlessM4TTextToUnitForConditionalGeneration",
        "SeamlessM4Tv2TextToUnitForConditionalGeneration",
        "SpeechT5ForSpeechToText",
        "Step3p7ForConditionalGeneration",
        "VisualBertForRegionToPhraseAlignment",
        "VoxtralRealtimeForConditionalGeneration",
        "XmodForCausalLM",
        "XmodForMaskedLM",
    ),
    # All parameters are those of base and adapter, but the model multiplies with a weight without calling its module
    # (MobileBERT), or norms the weight first (Muse Glimmer): PEFT unmerged answers otherwise than PEFT merged.
    "other answer": (
        "MobileBertForMaskedLM",
        "MobileBertForPreTraining",
        "MuseGlimmerForConditionalGeneration",
    ),
}
EXPECTED = {name: why for why, names in REASONS.items() for name in names}

#: A masked LM with a tied bias, an encoder-decoder, one with a second tie, a multimodal and a causal one.
SAMPLE = (
    "BertForMaskedLM",
    "BartForConditionalGeneration",
    "NeoMMEForMaskedLM",
    "LlavaForConditionalGeneration",
    "LlamaForCausalLM",
)


@pytest.mark.parametrize("name", SAMPLE)
def test_untied_it_is_base_and_adapter(tmp_path: Path, name: str) -> None:
    assert outcome(name, tmp_path) == EXPECTED.get(name, "")


@pytest.mark.slow
def test_every_class_that_declares_a_tie(tmp_path: Path) -> None:
    found = {}
    for name, entry in BAKED["architectures"].items():
        if entry.get("tied") or entry.get("across"):
            found[name] = outcome(name, tmp_path / name)
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            gc.collect()
    assert {name: what for name, what in found.items() if what} == EXPECTED
    assert len(found) >= 400


# --- biases that are tied ---------------------------------------------------------------------------------------------

MASKED = ("AlbertForMaskedLM", "LukeForMaskedLM", "RobertaForMaskedLM", "XLMRobertaXLForCausalLM")
#: What LoRA is put on, and what else is trained.
HEADS: dict[str, dict[str, Any]] = {
    "lora_bias": {"lora_bias": True},
    "all biases": {"bias": "all"},
    "the module's bias": {"bias": "lora_only"},
    "the head saved": {"saves": True},
}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *(("BertForMaskedLM", how) for how in HEADS),
        *(pytest.param(name, how, marks=pytest.mark.slow) for name in MASKED for how in HEADS),
    ],
)
def test_a_head_with_a_tied_bias(tmp_path: Path, name: str, how: str) -> None:
    cls = getattr(transformers, name)
    zoo.build(cls, tmp_path / "base")
    base = zoo.load(cls, tmp_path / "base")
    head = zoo.heads(base)[0]
    settings = dict(HEADS[how])
    query = [module for module, _ in base.named_modules() if module.endswith(("query", "q_proj"))][:1]
    saves = settings.pop("saves", False)
    settings |= {"modules_to_save": [head]} if saves else {}
    zoo.train(zoo.load(cls, tmp_path / "base"), query if saves else [head], tmp_path / "adapter", **settings)
    wrapped = zoo.attach(base, tmp_path / "adapter")
    model = zoo.load(cls, merged(tmp_path))
    assert not differences(dict(model.named_parameters(remove_duplicate=False)), zoo.effective(wrapped))
    answered = zoo.asked(wrapped)
    assert answered and is_answer(zoo.answer(model, answered[0]), answered[1])


def test_biases_alone_stay_tied(tmp_path: Path) -> None:
    """PEFT saves the one tensor under both names, and nothing has to be untied for it."""
    cls = transformers.BertForMaskedLM
    zoo.build(cls, tmp_path / "base")
    base = zoo.load(cls, tmp_path / "base")
    zoo.train(
        zoo.load(cls, tmp_path / "base"),
        ["bert.encoder.layer.0.attention.self.query"],
        tmp_path / "adapter",
        bias="all",
    )
    out = merged(tmp_path)
    wrapped = zoo.attach(base, tmp_path / "adapter")
    assert not differences(dict(zoo.load(cls, out).named_parameters(remove_duplicate=False)), zoo.effective(wrapped))
    assert json.loads((out / "config.json").read_text()).get("tie_word_embeddings", True)
