"""The documents: every link leads somewhere, and every command and every line of Python works on a small model."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from shardmerge.cli.main import cli
from tests.support.builders import (
    HIDDEN,
    INTERMEDIATE,
    LAYERS,
    ROOT,
    llama_tensors,
    model_config,
    random_tensor,
    write_base,
    write_peft,
)
from tests.support.gguf_zoo import SPM_VOCAB, write_spm_tokenizer

PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "LICENSE.md"
)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")
_PATH = re.compile(r"`((?:tools|tests|docs|configs|shardmerge|benchmarks)/[\w./-]+)`")
_MODULE = re.compile(r"python -m ((?:tools|benchmarks)\.\w+)")
#: Pages with examples, and what must be done before the first of them.
EXAMPLES = {
    "README.md": (),
    "docs/command-line.md": (),
    "docs/python.md": (),
    "docs/serving.md": ("shardmerge run config.yaml",),
}
#: Commands that load a model with transformers: here they are parsed, in their own tests they are run.
PARSED = ("chat", "compare")
#: Programs of others.
FOREIGN = ("pip", "vllm", "llama-cli", "llama-server", "ollama", "cd", "eval", "git")
BASE = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Language and text of the fenced blocks."""
    for match in _FENCE.finditer(text):
        yield match[1], match[2]


def commands(text: str) -> list[str]:
    """The lines of the shell blocks."""
    lines = [line for language, block in blocks(text) if language == "sh" for line in block.splitlines()]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        place, _, anchor = link.partition("#")
        if "://" in place:
            continue
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_files_and_modules_that_are_named_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path in _PATH.findall(text):
        assert (ROOT / path).exists(), path
    for module in _MODULE.findall(text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(_LINK.findall((ROOT / "README.md").read_text(encoding="utf-8")))
    for page in ROOT.glob("docs/*.md"):
        assert any(link.partition("#")[0] == f"docs/{page.name}" for link in linked), page.name


def test_anchors_are_those_of_github(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# What it is, and *why*\n```sh\n# no heading\n```\n## `-v` & Co.\n")
    assert anchors(page) == {"what-it-is-and-why", "-v--co"}


# --- examples ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base that a GGUF file can be made of, and an adapter; made without transformers, whose import takes seconds."""
    folder = tmp_path_factory.mktemp("model")
    ends = {name: random_tensor((SPM_VOCAB, HIDDEN), 1) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    config = model_config(
        vocab_size=SPM_VOCAB,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_act="silu",
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
    )
    base = write_base(folder / "base", llama_tensors() | ends, config=config, aux={})
    write_spm_tokenizer(base)
    return base, write_peft(folder / "adapter")


@dataclass
class Shell:
    """Runs commands in a folder that has what the examples name."""

    folder: Path

    def run(self, line: str) -> None:
        words = shlex.split(line, comments=True)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), line
        elif words[0] != "shardmerge":
            assert words[0] in FOREIGN or "COMPLETE" in words[0], f"unknown program: {line}"
            for path in (word for word in words if word.endswith(".gguf")):
                assert (self.folder / path).is_file(), line
        elif words[1] in PARSED:
            with click.Context(cli, **cli.context_settings) as context:
                cli.commands[words[1]].make_context(words[1], words[2:], parent=context)
        else:
            self.shardmerge(words[1:], line)

    def shardmerge(self, words: list[str], line: str) -> None:
        target = None
        if ">" in words:
            words, target = words[: words.index(">")], words[-1]
        done = CliRunner().invoke(cli, words)
        assert done.exit_code == 0, f"{line}\n{done.output}"
        if target is not None:
            Path(target).write_text(done.stdout, encoding="utf-8")


@pytest.fixture
def shell(model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """The folder is the working directory; ``config.yaml`` is the README's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for path, source in ((Path(BASE), model[0]), (Path("output/sft"), model[1])):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(source)
    (config,) = (text for language, text in blocks((ROOT / "README.md").read_text("utf-8")) if language == "yaml")
    Path("config.yaml").write_text(config, encoding="utf-8")
    return Shell(tmp_path)


@pytest.mark.parametrize("page", EXAMPLES)
def test_examples_work(shell: Shell, page: str) -> None:
    for line in EXAMPLES[page]:
        shell.run(line)
    variables: dict[str, object] = {}
    for language, text in blocks((ROOT / page).read_text(encoding="utf-8")):
        if language == "sh":
            for line in commands(f"```sh\n{text}```\n"):
                shell.run(line)
        elif language == "python" and "transformers" not in text:
            exec(compile(text, page, "exec"), variables)


def test_only_pages_with_examples_have_commands_of_ours() -> None:
    others = [page for page in PAGES if name_of(page) not in EXAMPLES]
    for page in others:
        assert not [line for line in commands(page.read_text(encoding="utf-8")) if line.startswith("shardmerge ")], page


def test_options_of_the_benchmarks_are_theirs() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py"))
    for line in commands((ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")):
        for option in re.findall(r" (--[\w-]+)", line):
            assert f'"{option}"' in sources, line
