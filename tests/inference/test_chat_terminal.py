"""`shardmerge chat` on a pseudo-terminal: what an answer may do to it, what is typed meanwhile, and how it is left."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shardmerge.errors import ConfigError
from shardmerge.inference import chat
from shardmerge.inference.chat import Chat, Message
from shardmerge.inference.chat.conversation import command, for_model
from shardmerge.inference.chat.terminal import Terminal

PATIENCE = 120.0  # seconds, for a machine that does something else as well

#: What a terminal obeys: window title, clear screen, clipboard, C1's CSI, what turns the order, a half of a character.
EVIL = "\x1b]0;title\x07\x1b[2J\x1b]52;c;aGk=\x1b\\\x9b2J\u202e\u2066\u061c\r\x08\ud83d\ude00"
ESCAPED = "\\x1b]0;title\\x07\\x1b[2J\\x1b]52;c;aGk=\\x1b\\\\x9b2J\\u202e\\u2066\\u061c\\r\\x08\\ud83d\\ude00"

#: A model of a few lines in place of transformers': it answers by its prompt, and waits where a test says so.
STUB = """
import fcntl, os, pathlib, select, signal, sys, termios, time
signal.signal(signal.SIGINT, signal.default_int_handler)
if "--no-session" not in sys.argv:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
sys.argv = [word for word in sys.argv if word != "--no-session"]
from shardmerge.inference import chat
from shardmerge.cli.main import main

def echo():
    return "on" if termios.tcgetattr(0)[3] & termios.ECHO else "off"

def answer(self, messages, count, stream_to):
    prompt = messages[-1]["content"]
    if prompt == "evil":
        for piece in THE_EVIL:
            stream_to(piece)
        stream_to("a\\tb\\n")
    elif prompt == "wait":
        stream_to("begin ")
        select.select([0], [], [])
        stream_to("end")
    elif prompt == "flag":
        stream_to("begin ")
        while not os.path.exists(os.environ["FLAG"]):
            time.sleep(0.01)
        stream_to("echo is " + echo())
    elif prompt == "bug":
        raise RuntimeError("a bug \\x1b[2J")
    elif prompt == "refused":
        raise chat.conversation.ConfigError("no \\x1b[2J here")
    else:
        stream_to(" ".join(message["content"] for message in messages))
    return ""

chat.Chat.answer = answer
chat.load = lambda path, template=None, device="auto": chat.Chat(None, None, None)
main()
""".replace("THE_EVIL", repr(EVIL))

ENVIRONMENT = {**os.environ, "TERM": "dumb", "INPUTRC": os.devnull}


def _as_on_a_terminal() -> None:
    """Signals do what they do by default, also where the tests run under nohup."""
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


class Session:
    """A chat in a process whose controlling terminal is this object's other end."""

    def __init__(
        self, folder: Path, *options: str, program: str = STUB, notices: bool = False, stdout: Any = None
    ) -> None:
        self.master, self.slave = pty.openpty()  # the slave stays open, so that what the process left can be seen
        self.seen = ""
        self.flag = folder / "flag"
        self.notices = folder / "notices"
        with self.notices.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program, "chat", str(folder), *options],
                stdin=self.slave,
                stdout=stdout or self.slave,
                stderr=self.slave if notices else file,
                start_new_session=True,
                env={**ENVIRONMENT, "XDG_STATE_HOME": str(folder / "state"), "FLAG": str(self.flag)},
                preexec_fn=_as_on_a_terminal,
            )

    def expect(self, text: str) -> str:
        """Read until ``text`` appears; returns, and forgets, what came up to its end."""
        end = time.monotonic() + PATIENCE
        while text not in self.seen:
            ended = self.process.poll() is not None  # asked before its last words are looked for
            ready, _, _ = select.select([self.master], [], [], 0.0 if ended else 1.0)
            if not ready and (ended or time.monotonic() > end):
                pytest.fail(f"no {text!r} in {self.seen!r}; notices: {self.notices.read_text()}")
            if ready:
                self.seen += os.read(self.master, 65536).decode().replace("\r\n", "\n")
        upto, _, self.seen = self.seen.partition(text)
        return upto

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def ask(self, prompt: str) -> None:
        self.expect("> ")
        self.type(f"{prompt}\n")
        self.expect(f"{prompt}\n")

    @property
    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self.slave)[3] & termios.ECHO)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Callable[..., Session]]:
    opened: list[Session] = []

    def start(*options: str, **settings: Any) -> Session:
        opened.append(Session(tmp_path, *options, **settings))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


# --- what an answer may do -------------------------------------------------------------------------------------------


def test_an_answer_cannot_command_the_terminal(session: Callable[..., Session]) -> None:
    user_side = session()
    user_side.ask("evil")
    assert user_side.expect("\n> ") == f"{ESCAPED}a\tb\n"


def test_an_answer_to_one_prompt_neither(session: Callable[..., Session]) -> None:
    assert session("--prompt", "evil").expect("a\tb\n") == ESCAPED


def test_a_pipe_gets_what_the_model_said(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STUB, "--no-session", "chat", str(tmp_path), "--prompt", "evil"]
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE, env=ENVIRONMENT)
    # Halves of a surrogate pair have no bytes in UTF-8.
    said = EVIL.replace("\ud83d\ude00", "\\ud83d\\ude00")
    assert (done.stdout.decode(), done.stderr) == (f"{said}a\tb\n\n", b"")


def test_errors_cannot_either(session: Callable[..., Session]) -> None:
    user_side = session(notices=True)
    user_side.ask("refused")
    user_side.expect("error: no \\x1b[2J here")
    user_side.ask("bug")
    user_side.expect("RuntimeError: a bug \\x1b[2J")
    assert user_side.process.wait(PATIENCE) == 1
    assert user_side.echoes


def test_a_line_of_history_cannot_either(session: Callable[..., Session], tmp_path: Path) -> None:
    file = tmp_path / "state" / "shardmerge" / "chat_history"
    file.parent.mkdir(parents=True)
    file.write_text("old \x9b2J\u202e line\n")
    user_side = session()
    user_side.expect("> ")
    user_side.type("\x10")  # as arrow up
    user_side.expect("old \\x9b2J\\u202e line")


def test_errors_that_transformers_logs(capsys: pytest.CaptureFixture[str]) -> None:
    import logging

    from shardmerge.inference import hf

    pytest.importorskip("transformers")
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        with hf.quiet():
            logger.error("the config says %s", EVIL)
        assert stream.getvalue() == f"the config says {ESCAPED}\n"
    finally:
        logger.removeHandler(handler)


# --- what is typed meanwhile -----------------------------------------------------------------------------------------


def test_what_is_typed_during_an_answer_is_the_next_line(session: Callable[..., Session]) -> None:
    user_side = session()
    user_side.ask("wait")
    assert user_side.expect("begin ") == ""
    assert not user_side.echoes
    user_side.type("typed meanwhile\n")
    assert user_side.expect("\n> ") == "end"
    assert user_side.expect("\n> ") == "typed meanwhile\nwait begin end typed meanwhile"
    user_side.type("/exit\n")
    assert user_side.process.wait(PATIENCE) == 0
    assert user_side.echoes


def test_without_an_editor_of_lines_it_is_dropped(session: Callable[..., Session], tmp_path: Path) -> None:
    """As nobody could see what would be sent."""
    with (tmp_path / "answers").open("wb") as answers:
        user_side = session(stdout=answers, notices=True)
    user_side.expect("> ")
    user_side.type("wait\n")
    user_side.expect("wait\n")
    while "begin " not in (tmp_path / "answers").read_text():
        time.sleep(0.01)
    user_side.type("typed meanwhile\n")
    assert user_side.expect("> ") == ""
    user_side.type("/exit\n")
    assert user_side.process.wait(PATIENCE) == 0
    assert (tmp_path / "answers").read_text() == "begin end\n"


def test_a_terminal_of_others_is_left_alone() -> None:
    """A process that is not in its foreground would be stopped if it changed it."""
    master, slave = pty.openpty()
    with open(slave, closefd=False) as stream, Terminal(stream).muted(forget=True):
        assert termios.tcgetattr(slave)[3] & termios.ECHO
    os.close(slave)
    os.close(master)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGQUIT, -signal.SIGQUIT), (signal.SIGHUP, -signal.SIGHUP)],
    ids=["terminated", "quit", "hung up"],
)
def test_a_signal_leaves_the_terminal_as_it_was(session: Callable[..., Session], number: int, code: int) -> None:
    user_side = session()
    user_side.ask("flag")
    user_side.expect("begin ")
    assert not user_side.echoes
    os.kill(user_side.process.pid, number)
    assert user_side.process.wait(PATIENCE) == code
    assert user_side.echoes


def test_ctrl_c_and_ctrl_d_leave_the_terminal_as_it_was(session: Callable[..., Session]) -> None:
    user_side = session()
    user_side.ask("flag")
    user_side.expect("begin ")
    user_side.type("\x03")
    user_side.expect("\n> ")
    user_side.type("\x04")
    assert user_side.process.wait(PATIENCE) == 0
    assert user_side.echoes


#: A shell: it runs the program in a process group of its own, and takes the terminal back when that stops.
SHELL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
child = os.fork()
if child == 0:
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpid())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    os.execv(sys.executable, [sys.executable, "-c", PROGRAM, "--no-session", *sys.argv[1:]])
_, status = os.waitpid(child, os.WUNTRACED)
assert os.WIFSTOPPED(status), status
os.tcsetpgrp(0, os.getpgrp())
print("stopped, echo is", "on" if termios.tcgetattr(0)[3] & termios.ECHO else "off", flush=True)
os.tcsetpgrp(0, child)
os.kill(-child, signal.SIGCONT)
open(os.environ["FLAG"], "w").close()
_, status = os.waitpid(child, 0)
os.tcsetpgrp(0, os.getpgrp())
sys.exit(os.WEXITSTATUS(status))
""".replace("PROGRAM", repr(STUB))


def test_ctrl_z_gives_the_terminal_back_and_fg_takes_it(session: Callable[..., Session]) -> None:
    user_side = session(program=SHELL)
    user_side.ask("flag")
    user_side.expect("begin ")
    user_side.type("\x1a")
    user_side.expect("stopped, echo is on\n")
    assert user_side.expect("\n> ") == "echo is off"
    user_side.type("/exit\n")
    assert user_side.process.wait(PATIENCE) == 0
    assert user_side.echoes


def test_a_stream_that_is_no_terminal_is_left_alone() -> None:
    class Pretender(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream in (io.StringIO(), Pretender()):
        with Terminal(stream).muted(forget=True):
            pass


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("/exit", ("/exit", "")),
        ("  /quit ", ("/quit", "")),
        ("/system be brief ", ("/system", "be brief")),
        ("what is /etc?", None),
        ("//etc", None),
        ("", None),
    ],
)
def test_what_is_a_command(line: str, found: tuple[str, str] | None) -> None:
    assert command(line) == found


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/rest", r"no command /rest; did you mean /reset\?"),
        ("/Exit", r"did you mean /exit\?"),
        ("/etc/passwd says?", r"no command /etc/passwd; /help lists them"),
        ("/reset now", "/reset takes no text after it"),
        ("/", "there is no command /; "),
    ],
)
def test_a_slip_is_no_command(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        command(line)


def test_two_slashes_are_one_to_the_model() -> None:
    assert [for_model(line) for line in ("//etc//x", " //a", "a // b")] == ["/etc//x", " /a", "a // b"]


class Recorder:
    """In place of `Chat.answer`: remembers what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[list[Message]] = []

        def answer(_: Chat, messages: list[Message], count: int, stream_to: Callable[[str], object]) -> str:
            self.asked.append(list(messages))
            stream_to("yes")
            return "yes"

        monkeypatch.setattr(Chat, "answer", answer)


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_commands_and_slips_do_not_reach_the_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder(monkeypatch)
    lines = "one\n/rset\n/help\n/system\n/system be \x1b[2J brief\n//etc\n/system\n/exit\ntwo\n"
    monkeypatch.setattr(sys, "stdin", FakeTerminal(lines))
    chat.loop(Chat(None, None, None))
    opening = {"role": "system", "content": "be \x1b[2J brief"}
    assert recorder.asked == [
        [{"role": "user", "content": "one"}],
        [opening, {"role": "user", "content": "/etc"}],
    ]
    told = capsys.readouterr().err
    assert "there is no command /rset; did you mean /reset?" in told
    assert "/system TEXT  forget the conversation" in told
    assert "the system message: nothing" in told and "the system message: be \\x1b[2J brief" in told
    assert "\x1b" not in told


def test_off_a_terminal_a_slip_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n/rset\ntwo\n"))
    with pytest.raises(ConfigError, match="there is no command /rset"):
        chat.loop(Chat(None, None, None))
    assert len(recorder.asked) == 1
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    with pytest.raises(ConfigError, match="is not text"):
        chat.loop(Chat(None, None, None))


# --- loading ---------------------------------------------------------------------------------------------------------


def test_a_terminal_is_told_that_the_model_loads(session: Callable[..., Session], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(2_000_000))
    user_side = session(notices=True)
    assert user_side.expect("loaded in ").startswith(f"loading {tmp_path} (2.0 MB), which takes")
    user_side.expect("/help lists the commands")


def test_elsewhere_nothing_is_said(session: Callable[..., Session]) -> None:
    user_side = session()  # whose notices go to a file
    user_side.expect("> ")
    assert "load" not in user_side.notices.read_text()
