"""`inference.chat` against tiny random models: what `generate` says is the oracle, a pseudo-terminal the user."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from shardmerge.cli.main import cli
from shardmerge.errors import ConfigError, FormatError, ShardmergeError, SourceError
from shardmerge.inference import chat
from shardmerge.inference.chat import Chat, Message
from tests.support.peft_oracle import merge_to, random, write_adapter
from tests.support.talkers import byte_tokenizer, save_model, word_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

transformers = pytest.importorskip("transformers")

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['content'] == 'word13' %}{{ raise_exception('no word13 here') }}{% endif %}"
    "{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 5, "num_beams": 4, "max_length": 9}


@pytest.fixture(scope="module")
def plain_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("plain"), word_tokenizer())


@pytest.fixture(scope="module")
def templated_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("templated"), word_tokenizer(), CHAT_TEMPLATE, **SAMPLING)


@pytest.fixture(scope="module")
def plain(plain_dir: Path) -> Chat:
    return chat.load(str(plain_dir))


@pytest.fixture(scope="module")
def templated(templated_dir: Path) -> Chat:
    return chat.load(str(templated_dir))


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that reaches a model, as the model sees it."""
    seen: list[str] = []
    generate = transformers.LlamaForCausalLM.generate

    def spy(self: Any, **inputs: Any) -> Any:
        seen.append(word_tokenizer().decode(inputs["input_ids"][0].tolist()))
        return generate(self, **inputs)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", spy)
    return seen


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def ignore(piece: str) -> None:
    pass


def oracle(asked: Chat, prompt: str, n: int) -> str:
    """What ``generate`` and ``decode`` make of ``prompt`` without `shardmerge`, from a fresh copy of the model."""
    where = asked.model.name_or_path
    model = transformers.AutoModelForCausalLM.from_pretrained(where, torch_dtype=torch.bfloat16)
    inputs = asked.tokenizer(prompt, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    out = model.generate(**inputs, max_new_tokens=n, do_sample=False, num_beams=1, max_length=None)
    text: str = asked.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


# --- answers ---------------------------------------------------------------------------------------------------------


def test_streamed_pieces_are_the_answer_and_the_answer_is_greedy(plain: Chat) -> None:
    pieces: list[str] = []
    answer = plain.answer([user("word1 word2")], 24, pieces.append)
    assert "".join(pieces) == answer == oracle(plain, chat.DEFAULT_TEMPLATE.replace("{}", "word1 word2"), 24)
    assert len(pieces) > 10
    assert all(pieces)


@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_bytes_of_unfinished_characters_are_held_back(tmp_path: Path, n: int) -> None:
    asked = chat.load(str(save_model(tmp_path, byte_tokenizer())), template="{}")
    pieces: list[str] = []
    answer = asked.answer([user("größer 😀 the cat")], n, pieces.append)
    assert "".join(pieces) == answer == oracle(asked, "größer 😀 the cat", n)


def test_a_character_that_comes_in_three_tokens_comes_as_one_piece() -> None:
    pieces: list[str] = []
    streamer = chat.model.Streamer(lambda ids: bytes(ids).decode(errors="replace"), pieces.append)
    streamer.put(torch.tensor([[65, 66]]))
    for byte in "a€b".encode():
        streamer.put(torch.tensor([byte]))
    streamer.put(torch.tensor([0xE2]))
    assert pieces == ["a", "€", "b"]
    streamer.end()
    assert streamer.text == "a€b\ufffd"


def test_the_stored_dtype_and_eval_mode_are_kept(plain: Chat) -> None:
    assert plain.model.dtype == torch.bfloat16
    assert not plain.model.training


def test_no_thread_outlives_an_answer(plain: Chat) -> None:
    before = set(threading.enumerate())
    plain.answer([user("word1")], 4, ignore)
    assert set(threading.enumerate()) == before


def test_an_answer_stops_at_the_end_token_of_the_tokenizer(plain_dir: Path, plain: Chat, tmp_path: Path) -> None:
    words = plain.answer([user("word1")], 12, ignore).split()
    stop = next(word for word in words[1:] if word != words[0])
    tokenizer = word_tokenizer()
    tokenizer.eos_token = stop
    asked = chat.load(str(save_model(tmp_path, tokenizer, eos_token_id=1)))
    assert asked.answer([user("word1")], 12, ignore).split() == words[: words.index(stop)]


def test_an_answer_needs_room_for_a_token(plain: Chat) -> None:
    with pytest.raises(ConfigError, match="max new tokens is 0; expected 1 or more"):
        plain.answer([user("word1")], 0, ignore)


def test_a_context_that_is_too_short_is_an_error_of_ours(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=None, eos_token_id=None
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="longer than the model's context"):
        chat.load(str(tmp_path)).answer([user("word1")], 12, ignore)


# --- templates -------------------------------------------------------------------------------------------------------

SYSTEM: Message = {"role": "system", "content": "word7"}


@pytest.mark.parametrize(
    ("template", "seen"),
    [
        pytest.param(None, "system word7 user word1 assistant word2 user word3 assistant", id="chat template"),
        pytest.param("word5 {} word6", "word7 word5 word3 word6", id="--template wins"),
        pytest.param("{0} word5 {} {x}", "word7 <unk> word5 word3 <unk>", id="other braces"),
    ],
)
def test_what_the_model_sees(templated_dir: Path, prompts: list[str], template: str | None, seen: str) -> None:
    asked = chat.load(str(templated_dir), template)
    asked.answer([SYSTEM, user("word1"), {"role": "assistant", "content": "word2"}, user("word3")], 1, ignore)
    assert prompts == [seen]


@pytest.mark.parametrize(
    ("given", "used"),
    [
        pytest.param(None, "### Instruction:\n{}\n\n### Response:\n", id="default"),
        pytest.param(r"a\n{}\nb", "a\n{}\nb", id="typed in a shell"),
        pytest.param("{", None, id="no place"),
        pytest.param("", None, id="empty"),
        pytest.param("{} {}", None, id="two places"),
    ],
)
def test_plain_templates(plain_dir: Path, given: str | None, used: str | None) -> None:
    if used is None:
        with pytest.raises(ConfigError, match=r"has \d places \{\} for the prompt; expected exactly 1"):
            chat.load(str(plain_dir), given)
    else:
        assert chat.load(str(plain_dir), given).template == used


def test_braces_in_a_prompt_are_left_alone(plain_dir: Path, prompts: list[str]) -> None:
    chat.load(str(plain_dir), "word1 {}").answer([user("{} word2")], 1, ignore)
    assert prompts == ["word1 <unk> word2"]


def test_a_chat_template_that_refuses_is_a_config_error(templated: Chat) -> None:
    with pytest.raises(
        ConfigError, match=r"chat template refuses: .*no word13 here; one of your own \(template=\) goes around"
    ):
        templated.answer([user("word13")], 1, ignore)


# --- directories that hold no finished model --------------------------------------------------------------------------


def without(*names: str) -> Callable[[Path], None]:
    def remove(path: Path) -> None:
        for name in names:
            (path / name).unlink()

    return remove


def with_file(name: str, content: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        (path / name).write_text(content)

    return write


def drop_a_tensor(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def change_a_shape(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def lose_a_shard(path: Path) -> None:
    (path / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        pytest.param(without("config.json"), "not a finished model: there is no config.json", id="no config"),
        pytest.param(without("model.safetensors"), "not a finished model: there is no model.safet", id="no weights"),
        pytest.param(without("tokenizer.json", "tokenizer_config.json"), "transformers cannot", id="no tokenizer"),
        pytest.param(with_file("config.json", "{"), "transformers cannot load this model", id="bad config"),
        pytest.param(with_file("config.json", '{"model_type": "nosuch"}'), "cannot load this model", id="unknown"),
        pytest.param(with_file("model.safetensors", "short"), "cannot load this model", id="bad weights"),
        pytest.param(with_file("adapter_config.json", "{}"), "expected a merged model", id="an adapter beside it"),
        pytest.param(lose_a_shard, "transformers cannot load this model", id="lost shard"),
        pytest.param(drop_a_tensor, "1 of the model's tensors are not in its files, such as model.norm", id="tensor"),
        pytest.param(change_a_shape, "transformers cannot load this model", id="shape"),
    ],
)
def test_an_unfinished_model_is_a_format_error(
    tmp_path: Path, break_it: Callable[[Path], None], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    break_it(save_model(tmp_path, word_tokenizer()))
    capfd.readouterr()  # saving has a progress bar of its own
    with pytest.raises(FormatError, match=message) as caught:
        chat.load(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "found"), [pytest.param("nowhere", "nothing", id="nothing"), pytest.param("file", "a file", id="file")]
)
def test_a_path_that_is_no_directory_is_a_source_error(tmp_path: Path, name: str, found: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match=f"expected a model's directory, found {found}"):
        chat.load(str(tmp_path / name))


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    config = {"model_type": "nosuch", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    save_model(tmp_path, word_tokenizer())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(FormatError):
        chat.load(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_tensors_that_are_left_out_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path, word_tokenizer())
    tensors = load_file(tmp_path / "model.safetensors") | {"model.layers.0.lora_A.weight": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    chat.load(str(tmp_path))
    assert "not part of this model and unused: 1 tensor, such as model.layers.0.lora_A" in capsys.readouterr().err


def test_without_transformers_the_extra_is_named(plain_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="this needs transformers: pip install transformers"):
        chat.load(str(plain_dir))


# --- once and loop, off a terminal -----------------------------------------------------------------------------------


def test_once_reads_stdin_for_a_dash(
    plain: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("word1\n"))
    chat.once(plain, "-", max_new_tokens=5)
    chat.once(plain, "word1", max_new_tokens=5)
    out, err = capsys.readouterr()
    assert out == 2 * (plain.answer([user("word1")], 5, ignore) + "\n")
    assert err == ""


@pytest.mark.parametrize("stdin", [pytest.param(b" \n", id="empty"), pytest.param(b"\xff\xfe", id="not text")])
def test_a_prompt_that_is_none_is_a_config_error(plain: Chat, monkeypatch: pytest.MonkeyPatch, stdin: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
    with pytest.raises(ConfigError, match="the prompt"):
        chat.once(plain, "-")


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_loop_remembers_and_forgets(
    templated: Chat, prompts: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("word1\n\nword2\n/reset\nword3\n/quit\nword4\n"))
    chat.loop(templated, system="word7", max_new_tokens=1)
    out, err = capsys.readouterr()
    first, _, third = out.splitlines()
    assert prompts == [
        "system word7 user word1 assistant",
        f"system word7 user word1 assistant {first} user word2 assistant",
        "system word7 user word3 assistant",
    ]
    assert third == templated.answer([SYSTEM, user("word3")], 1, ignore)
    assert err == "the conversation is forgotten\n"


def test_a_plain_template_has_no_memory(plain_dir: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("word1\nword2"))
    chat.loop(chat.load(str(plain_dir), "word5 {}"), max_new_tokens=1)
    assert prompts == ["word5 word1", "word5 word2"]


def test_a_stopped_answer_is_remembered_as_far_as_it_came(
    templated: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Sequence[Message]] = []

    def answer(self: Chat, messages: Sequence[Message], n: int, stream_to: Callable[[str], object]) -> str:
        asked.append(messages)
        if len(asked) > 1:
            stream_to("half")
        if len(asked) < 3:
            raise KeyboardInterrupt
        return "half"

    monkeypatch.setattr(Chat, "answer", answer)
    monkeypatch.setattr(sys, "stdin", FakeTerminal("one\ntwo\nthree\n"))
    chat.loop(templated)
    assert asked[1:] == [[user("two")], [user("two"), {"role": "assistant", "content": "half"}, user("three")]]
    assert capsys.readouterr().err.count("(stopped)") == 2


class InterruptedTerminal(FakeTerminal):
    """Ctrl-C before the first line; a real terminal may hold that back until Enter, for `input` has a race there."""

    interrupts = 1

    def readline(self, size: int | None = -1, /) -> str:  # type: ignore[override]  # as io.StringIO's own is
        if self.interrupts:
            self.interrupts -= 1
            raise KeyboardInterrupt
        return super().readline(-1 if size is None else size)


def test_ctrl_c_at_the_prompt_drops_the_line(
    plain: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", InterruptedTerminal("word1\n"))
    chat.loop(plain, max_new_tokens=1)
    out, err = capsys.readouterr()
    assert out == plain.answer([user("word1")], 1, ignore) + "\n"
    assert err.count("(stopped)") == 1


def test_an_error_is_survived_on_a_terminal_only(
    templated: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", FakeTerminal("word13\nword1\n"))
    chat.loop(templated, max_new_tokens=1)
    out, err = capsys.readouterr()
    assert out == templated.answer([user("word1")], 1, ignore) + "\n"
    assert "error: the chat template refuses" in err
    assert err.count("> ") == 3
    monkeypatch.setattr(sys, "stdin", io.StringIO("word13\nword1\n"))
    with pytest.raises(ShardmergeError):
        chat.loop(templated, max_new_tokens=1)


# --- history ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "expected"),
    [("/state", "/state/shardmerge/chat_history"), ("", None), ("relative", None)],
    ids=["given", "none", "relative"],
)
def test_where_history_is_kept(monkeypatch: pytest.MonkeyPatch, state: str, expected: str | None) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", state)
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(chat.terminal.history_file()) == (expected or "/home/someone/.local/state/shardmerge/chat_history")


def test_history_is_the_users_own_and_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readline = pytest.importorskip("readline")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    file = chat.terminal.history_file()
    chat.terminal.History()
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    file.write_text("".join(f"line {number}\n" for number in range(1500)))
    history = chat.terminal.History()
    readline.add_history("the last")
    history.keep()
    history.keep()
    lines = file.read_text().splitlines()
    assert len(lines) == 1000
    assert lines[-2:] == ["line 1499", "the last"]


def test_without_a_place_for_history_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    chat.terminal.History().keep()
    monkeypatch.setitem(sys.modules, "readline", None)
    chat.terminal.History().keep()


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged_dir(plain_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    factors = (random(4, 32, seed=1), random(32, 4, seed=2))
    write_adapter(folder / "adapter", {"model.layers.0.self_attn.v_proj": factors})
    merge_to(folder / "out", plain_dir, folder / "adapter")
    return folder / "out"


def run(*arguments: str | Path, stdin: str | None = None) -> Any:
    return CliRunner().invoke(cli, ["chat", *map(str, arguments)], input=stdin)


def test_one_answer_as_json(merged_dir: Path) -> None:
    answer = chat.load(str(merged_dir)).answer([SYSTEM, user("word1")], 6, ignore)
    done = run(merged_dir, "--prompt", "-", "--system", "word7", "--max-new-tokens", "6", "--json", stdin="word1\n")
    assert done.exit_code == 0, done.output
    expected = {"model": str(merged_dir), "system": "word7", "prompt": "word1", "answer": answer}
    assert (json.loads(done.stdout), done.stderr) == (expected, "")


def test_adapter_off_is_the_base(merged_dir: Path, plain_dir: Path, plain: Chat, tmp_path: Path) -> None:
    options = ("--prompt", "word1", "--max-new-tokens", "8")
    base = plain.answer([user("word1")], 8, ignore) + "\n"
    assert run(merged_dir, *options).stdout != base
    done = run(merged_dir, *options, "--adapter-off")
    assert done.stdout == base
    assert done.stderr == f"this is the base, without the adapter: {plain_dir}\n"
    shutil.copytree(plain_dir, tmp_path / "moved")
    assert run(merged_dir, *options, "--adapter-off", "--base", tmp_path / "moved").stdout == base


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--json"], 2, "--json is for one answer: give --prompt"),
        (["--prompt", "a", "--base", "b"], 2, "to talk to it with --adapter-off"),
        (["--prompt", "a", "--adapter-off"], 4, "no shardmerge.json that can be read"),
        (["--prompt", " "], 2, "the prompt is empty"),
    ],
    ids=["json", "base", "no record", "empty"],
)
def test_what_the_command_refuses(plain_dir: Path, arguments: list[str], code: int, message: str) -> None:
    done = run(plain_dir, *arguments)
    assert done.exit_code == code
    assert message in done.stderr


# --- a real process --------------------------------------------------------------------------------------------------

PATIENCE = 120.0  # seconds, for a machine that does something else as well

ENVIRONMENT = {**os.environ, "TERM": "dumb", "INPUTRC": os.devnull, "OMP_NUM_THREADS": "1"}

ONCE = "import sys; from shardmerge.inference import chat; chat.once(chat.load(sys.argv[1]), 'word1', max_new_tokens=6)"
# A background job's children inherit an ignored SIGINT, and only a session's leader can take its terminal.
LOOP = (
    "import fcntl, signal, sys, termios; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0); from shardmerge.cli.main import main; main()"
)


def test_a_process_writes_the_answer_and_nothing_else(templated_dir: Path, templated: Chat) -> None:
    command = [sys.executable, "-c", ONCE, str(templated_dir)]
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE, env=ENVIRONMENT)
    assert done.stdout.decode() == templated.answer([user("word1")], 6, ignore) + "\n"
    assert (done.stderr, done.returncode) == (b"", 0)


class Session:
    """A loop in a process whose controlling terminal is this object's other end; its stderr goes to a file."""

    def __init__(self, model: Path, max_new_tokens: int, notices: Path) -> None:
        self.master, slave = pty.openpty()
        self.notices = notices
        self.seen = ""
        with notices.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LOOP, "chat", str(model), "--max-new-tokens", str(max_new_tokens)],
                stdin=slave,
                stdout=slave,
                stderr=stderr,
                start_new_session=True,
                env={**ENVIRONMENT, "XDG_STATE_HOME": str(notices.parent / "state")},
            )
        os.close(slave)

    def expect(self, text: str) -> str:
        """Read until ``text`` appears; returns, and forgets, what came up to its end."""
        end = time.monotonic() + PATIENCE
        while text not in self.seen:
            ready, _, _ = select.select([self.master], [], [], max(0.0, end - time.monotonic()))
            try:
                assert ready
                self.seen += os.read(self.master, 65536).decode().replace("\r\n", "\n")
            except (AssertionError, OSError):  # OSError: the process has ended
                pytest.fail(f"no {text!r} in {self.seen!r}; notices: {self.notices.read_text()}")
        upto, _, self.seen = self.seen.partition(text)
        return upto

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Callable[[Path, int], Session]]:
    opened: list[Session] = []

    def start(model: Path, max_new_tokens: int) -> Session:
        opened.append(Session(model, max_new_tokens, tmp_path / "notices"))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


@pytest.mark.slow
def test_a_terminal_asks_is_answered_and_leaves(
    session: Callable[[Path, int], Session], templated_dir: Path, templated: Chat
) -> None:
    user_side = session(templated_dir, 6)
    user_side.expect("> ")
    user_side.type("word1\n")
    user_side.expect(templated.answer([user("word1")], 6, ignore) + "\n> ")
    user_side.type("/reset\n")
    user_side.expect("> ")
    user_side.type("/exit\n")
    assert user_side.process.wait(PATIENCE) == 0
    assert user_side.notices.read_text().splitlines()[1:] == ["the conversation is forgotten"]


@pytest.mark.slow
def test_a_line_of_an_earlier_session_comes_back(
    session: Callable[[Path, int], Session], tmp_path: Path, templated_dir: Path, templated: Chat
) -> None:
    file = tmp_path / "state" / "shardmerge" / "chat_history"
    file.parent.mkdir(parents=True)
    file.write_text("word2\nword1\n")
    user_side = session(templated_dir, 6)
    user_side.expect("> ")
    user_side.type("\x10\n")  # as arrow up
    user_side.expect(templated.answer([user("word1")], 6, ignore) + "\n> ")
    user_side.type("word3\n")
    user_side.expect("\n> ")
    # Killed, it can write nothing any more.
    user_side.process.kill()
    user_side.process.wait()
    assert file.read_text().splitlines() == ["word2", "word1", "word3"]


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_ctrl_d_the_program(
    session: Callable[[Path, int], Session], plain_dir: Path, plain: Chat
) -> None:
    user_side = session(plain_dir, 1_000_000)  # hours
    user_side.expect("> ")
    for prompt in ("word1", "word2"):
        user_side.type(prompt + "\n")
        user_side.expect(plain.answer([user(prompt)], 5, ignore))
        user_side.type("\x03")
        user_side.expect("\n> ")
    user_side.type("\x04")
    assert user_side.process.wait(PATIENCE) == 0
    assert user_side.notices.read_text().count("(stopped)") == 2
