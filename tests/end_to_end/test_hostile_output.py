"""Whatever somebody has put into an output directory, nothing outside of it is written, removed or waited for.

Every file and folder that a merge keeps in its work folder is each kind of thing that is not what a merge puts there:
before the plan, between plan and merge, and at every step of a merge. So are the files that records and journals name.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

import shardmerge
from shardmerge import OutputError, PlanError, ResumeError, ShardmergeError
from shardmerge.cli.main import cli
from shardmerge.destinations.local.directory import Commit
from tests.support.builders import (
    Place,
    contents,
    make_place,
    peft_tensors,
    shard_names,
    slow_but,
    snapshot,
    write_json,
    write_peft,
)
from tests.support.faults import WRITES, Steps
from tests.support.tampering import sealed

FIRST, SECOND = shard_names(2)
INDEX = "model.safetensors.index.json"
WORK = ".shardmerge"
#: Everything that a merge has in its work folder, and under which names it writes it first.
WORK_FILES = (
    *("holder", "lock", "journal.json", "journal.json.tmp"),
    *(f"stage/{FIRST}", f"stage/{SECOND}", f"stage/{SECOND}.tmp"),
    *(f"receipts/{FIRST}.json", f"receipts/{SECOND}.json", f"receipts/{SECOND}.json.tmp"),
)
WORK_FOLDERS = ("", "stage", "receipts")


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    """A reader that waits for somebody to write into a FIFO ends as a failure."""

    def give_up(number: int, frame: Any) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Beside base, adapter and output, a folder of somebody else's, with a file of every name that a merge has."""
    place = make_place(tmp_path)
    outside = tmp_path / "outside"
    for name in (*WORK_FILES, "victim.json", "config.json", FIRST, SECOND, INDEX):
        (outside / name).parent.mkdir(parents=True, exist_ok=True)
        (outside / name).write_text("somebody's")
    return place


def outside(place: Place) -> Path:
    return place.folder / "outside"


# --- what is put there ------------------------------------------------------------------------------------------------


def link_to_file(path: Path, place: Place) -> None:
    path.symlink_to(outside(place) / "victim.json")


def link_to_folder(path: Path, place: Place) -> None:
    path.symlink_to(outside(place))


def link_to_nowhere(path: Path, place: Place) -> None:
    path.symlink_to(outside(place) / "new.json")


def hard_link(path: Path, place: Place) -> None:
    os.link(outside(place) / "victim.json", path)


def fifo(path: Path, place: Place) -> None:
    os.mkfifo(path)


def folder(path: Path, place: Place) -> None:
    path.mkdir()
    (path / "inner").write_text("x")


def device(path: Path, place: Place) -> None:
    path.symlink_to("/dev/zero")


KINDS = (link_to_file, link_to_folder, link_to_nowhere, hard_link, fifo, folder, device)


def put(path: Path, kind: Callable[[Path, Place], None], place: Place) -> None:
    """In the place of whatever is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    kind(path, place)


def stop_in_second(place: Place) -> None:
    """Leave an unfinished merge that has its first shard."""

    def progress(now: shardmerge.Progress) -> None:
        if now.shard_number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shardmerge.merge(place.config(), progress=progress)


def invoke(place: Place, *arguments: str | Path) -> tuple[int, str]:
    """Exit code and stderr of a command; a traceback is raised."""
    result = CliRunner().invoke(cli, [*map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stderr


# --- the work folder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_no_merge_puts_into_the_work_folder_is_refused_by_name(
    kind: Callable[[Path, Place], None], place: Place
) -> None:
    stop_in_second(place)
    kept = place.folder / "kept"
    shutil.copytree(place.output, kept)
    before, config = snapshot(outside(place)), place.config_file()
    for name in (*WORK_FILES, *WORK_FOLDERS):
        if name in WORK_FOLDERS and kind in (folder, hard_link):
            continue
        shutil.rmtree(place.output)
        shutil.copytree(kept, place.output)
        put(place.output / WORK / name, kind, place)
        there = snapshot(place.output)
        for command in (("plan",), ("run",), ("run", "--overwrite")):
            code, message = invoke(place, *command, config)
            assert code == 3 and str(place.output / WORK / name) in message, (name, command, message)
            assert "output.path" in message and "nothing was written" in message
        code, message = invoke(place, "verify", place.output)
        assert code == 6, (name, message)
        assert snapshot(place.output) == there and snapshot(outside(place)) == before, name


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_put_there_after_the_plan_leads_nowhere(kind: Callable[[Path, Place], None], place: Place) -> None:
    """A merge may go on, where what is there can be replaced; else it is an error."""
    shardmerge.merge(place.config(output={"path": str(place.folder / "expected")}))
    expected = contents(place.folder / "expected")
    stop_in_second(place)
    kept = place.folder / "kept"
    shutil.copytree(place.output, kept)
    plan, before = shardmerge.plan(place.config()), snapshot(outside(place))
    for name in (*WORK_FILES, *WORK_FOLDERS):
        if name in WORK_FOLDERS and kind in (folder, hard_link):
            continue
        shutil.rmtree(place.output)
        shutil.copytree(kept, place.output)
        put(place.output / WORK / name, kind, place)
        try:
            shardmerge.merge(plan)
            assert contents(place.output) == expected, name
        except (OutputError, ResumeError) as error:
            assert str(place.output) in str(error), name
        assert snapshot(outside(place)) == before, name


def broken(place: Place) -> None:
    """An adapter that cannot be merged, so that all work is discarded."""
    tensors = peft_tensors()
    name = next(iter(tensors))
    write_peft(place.adapter, {**tensors, name: tensors[name] / 0})


@pytest.mark.parametrize("kind", [link_to_file, link_to_folder, fifo, hard_link])
def test_what_is_put_there_is_not_followed_when_all_is_discarded(
    kind: Callable[[Path, Place], None], place: Place
) -> None:
    broken(place)
    plan, before = shardmerge.plan(place.config()), snapshot(outside(place))
    for name in (f"stage/{FIRST}", "stage/more", "receipts/more", "more", "stage/deep/er"):
        target = place.output / WORK / name

        def progress(now: shardmerge.Progress, target: Path = target) -> None:
            if not os.path.lexists(target):
                put(target, kind, place)

        with pytest.raises(shardmerge.NonFiniteError, match="Nothing is left of it"):
            shardmerge.merge(plan, progress=progress)
        assert not place.output.exists() and snapshot(outside(place)) == before, name


@pytest.mark.parametrize("name", slow_but(WORK_FOLDERS, "stage"))
def test_a_folder_that_is_swapped_for_a_link_at_any_step(name: str, place: Place) -> None:
    plan, before = shardmerge.plan(place.config()), snapshot(outside(place))
    with Steps(WRITES).watched() as steps:
        shardmerge.merge(plan)
    count, swapped = len(steps.taken), 0
    for at in range(0, count, 3):
        shutil.rmtree(place.output)
        of = place.output / WORK / name

        def swap(of: Path = of) -> None:
            nonlocal swapped
            if of.is_dir():
                os.rename(of, place.output / "moved")
                os.symlink(outside(place), of)
                swapped += 1

        try:
            with Steps(WRITES, at, swap).watched():
                shardmerge.merge(plan)
        except ShardmergeError as error:
            assert str(place.output) in str(error), at
        assert snapshot(outside(place)) == before, f"{at} of {count}"
    assert swapped > 10


# --- names in records and journals ------------------------------------------------------------------------------------


def change_json(path: Path, **changes: Any) -> dict[str, Any]:
    value = {**json.loads(path.read_text()), **changes}
    write_json(path, value)
    return value


def in_record(place: Place, names: list[str]) -> None:
    shardmerge.merge(place.config())
    record = place.output / "shardmerge.json"
    write_json(record, sealed(change_json(record, files=[*json.loads(record.read_text())["files"], *names])))


def in_damaged_record(place: Place, names: list[str]) -> None:
    in_record(place, names)
    change_json(place.output / "shardmerge.json", seconds=7)


def in_places(place: Place, names: list[str]) -> None:
    stop_in_second(place)
    change_json(place.output / WORK / "journal.json", places=names, committing=True)


def in_stale(place: Place, names: list[str]) -> None:
    stop_in_second(place)
    change_json(place.output / WORK / "journal.json", stale=names)


@pytest.mark.parametrize("where", [in_record, in_damaged_record, in_places, in_stale])
def test_no_name_reaches_through_a_linked_folder(where: Callable[[Place, list[str]], None], place: Place) -> None:
    where(place, ["sub/victim.json", "sub/stage/../victim.json", "../outside/victim.json", "sub"])
    (place.output / "sub").symlink_to(outside(place))
    before, there, config = snapshot(outside(place)), snapshot(place.output), place.config_file()
    for command in (("plan", "--overwrite"), ("run", "--overwrite"), ("run",)):
        code, message = invoke(place, *command, config)
        assert code == 3 and "output.path" in message, message
        assert snapshot(outside(place)) == before and snapshot(place.output) == there
    broken(place)
    code, message = invoke(place, "run", config, "--overwrite")
    assert code == 3 and snapshot(outside(place)) == before


@pytest.mark.parametrize("where", [in_record, in_places, in_stale])
def test_no_name_reaches_through_a_folder_that_is_linked_after_the_plan(
    where: Callable[[Place, list[str]], None], place: Place
) -> None:
    where(place, ["sub/victim.json"])
    other = place.config(adapters=[{"path": str(place.adapter), "weight": 2}])
    plan = shardmerge.plan(other, overwrite=True)
    (place.output / "sub").symlink_to(outside(place))
    before = snapshot(outside(place))
    with pytest.raises(OutputError, match="sub is a link"):
        shardmerge.merge(plan)
    assert snapshot(outside(place)) == before


@pytest.mark.parametrize("is_late", [False, True], ids=["", "after the plan"])
@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
def test_no_file_is_copied_through_a_linked_folder(overwrite: bool, is_late: bool, place: Place) -> None:
    (place.base / "sub").mkdir()
    (place.base / "sub" / "victim.json").write_text("{}")
    place.output.mkdir()
    (place.output / WORK).mkdir()
    if overwrite:
        (place.output / "notes.txt").write_text("x")
    before = snapshot(outside(place))
    with pytest.raises((OutputError, PlanError), match="sub is a link") as caught:
        if is_late:
            plan = shardmerge.plan(place.config(), overwrite=overwrite)
            (place.output / "sub").symlink_to(outside(place))
            shardmerge.merge(plan)
        else:
            (place.output / "sub").symlink_to(outside(place))
            shardmerge.plan(place.config(), overwrite=True)
    assert isinstance(caught.value, OutputError if is_late else PlanError)
    assert snapshot(outside(place)) == before


@pytest.mark.parametrize("name", ["config.json", FIRST, INDEX, "shardmerge.json", "config.json.tmp", f"{INDEX}.tmp"])
def test_a_folder_where_a_file_goes_is_refused_before_the_old_model_is_touched(name: str, place: Place) -> None:
    shardmerge.merge(place.config())
    path = place.output / name
    path.unlink(missing_ok=True)
    path.mkdir()
    there = snapshot(place.output)
    with pytest.raises(PlanError, match=r"is (a directory|not a regular file)"):
        shardmerge.merge(place.config(), overwrite=True)
    assert snapshot(place.output) == there


@pytest.mark.parametrize("kind", [link_to_file, link_to_nowhere, hard_link, fifo])
@pytest.mark.parametrize(
    "name", ["config.json", FIRST, INDEX, "config.json.tmp", f"{INDEX}.tmp", "shardmerge.json.tmp"]
)
def test_what_is_in_a_files_place_is_replaced_and_not_written_through(
    name: str, kind: Callable[[Path, Place], None], place: Place
) -> None:
    shardmerge.merge(place.config())
    expected, before = contents(place.output), snapshot(outside(place))
    put(place.output / name, kind, place)
    shardmerge.merge(place.config(), overwrite=True)
    assert contents(place.output) == expected and snapshot(outside(place)) == before
    assert not any(path.is_symlink() for path in place.output.iterdir())


def test_a_copy_of_hard_links_keeps_its_bytes(place: Place) -> None:
    """As ``cp -al`` makes it: the same files under other names."""
    shardmerge.merge(place.config())
    copy = place.folder / "copy"
    shutil.copytree(place.output, copy, copy_function=os.link)
    before = contents(copy)
    write_peft(place.adapter, {name: 2 * tensor for name, tensor in peft_tensors().items()})
    shardmerge.merge(place.config(), overwrite=True)
    assert contents(copy) == before != contents(place.output)


@pytest.mark.parametrize("made", [99, [[1, 2]] * 9, "x", None, {}], ids=str)
def test_a_journal_does_not_say_which_folders_around_the_output_are_removed(made: Any, place: Place) -> None:
    config = place.config(output={"path": str(place.folder / "there" / "deep" / "out")})
    (place.folder / "there" / "deep" / "out").mkdir(parents=True)

    def stop(now: shardmerge.Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shardmerge.merge(config, progress=stop)
    change_json(place.folder / "there" / "deep" / "out" / WORK / "journal.json", made=made)
    broken(place)
    with pytest.raises(shardmerge.NonFiniteError):
        shardmerge.merge(config, overwrite=True)
    assert os.listdir(place.folder / "there" / "deep" / "out") == []


def test_an_output_path_that_is_a_link_to_a_folder_is_the_users_choice(place: Place) -> None:
    room = place.folder / "room"
    room.mkdir()
    place.output.symlink_to(room)
    stop_in_second(place)
    assert shardmerge.merge(place.config()).shards_reused == 1
    assert shardmerge.merge(place.config(), overwrite=True).shards_reused == 0
    assert shardmerge.verify(place.output).raise_for_status().complete and place.output.is_symlink()
    assert len(load_file(room / FIRST)) and not (room / WORK).exists()


# --- a record that is not believed ------------------------------------------------------------------------------------


def no_seal(path: Path, place: Place) -> None:
    shardmerge.merge(place.config())
    change_json(path, seconds=7)


def no_json(path: Path, place: Place) -> None:
    path.write_text("{")


def endless(path: Path, place: Place) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize("kind", [no_seal, no_json, endless, link_to_nowhere, link_to_file, fifo, folder, device])
def test_a_damaged_record_is_believed_for_nothing(kind: Callable[[Path, Place], None], place: Place) -> None:
    record = place.output / "shardmerge.json"
    if kind is not no_seal:
        shardmerge.merge(place.config())
    (put(record, kind, place) if kind is not no_seal else no_seal(record, place))
    there, before, config = snapshot_of_kinds(place.output), snapshot(outside(place)), place.config_file()
    for command in ("plan", "run"):
        code, message = invoke(place, command, "--overwrite", config)
        assert code == 3 and "so nothing says which files that merge wrote" in message, message
        assert "remove the directory yourself" in message
    code, message = invoke(place, "run", config)
    assert code == 3 and "is not empty" in message
    code, message = invoke(place, "verify", place.output)
    assert code == 6 and "shardmerge.json" in message
    code, message = invoke(place, "compare", place.output)
    assert code == 4 and "shardmerge.json" in message
    assert snapshot_of_kinds(place.output) == there and snapshot(outside(place)) == before


def snapshot_of_kinds(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.lstat().st_mode, path.lstat().st_ino) for path in folder.iterdir()}


def test_a_record_that_is_damaged_after_the_plan_is_believed_for_nothing(place: Place) -> None:
    shardmerge.merge(place.config())
    plan = shardmerge.plan(place.config(), overwrite=True)
    change_json(place.output / "shardmerge.json", seconds=7)
    there = snapshot(place.output)
    with pytest.raises(ResumeError, match="nothing was changed"):
        shardmerge.merge(plan)
    assert snapshot(place.output) == there

    def damage(now: shardmerge.Progress) -> None:
        (place.output / "shardmerge.json").write_text("{")

    shutil.rmtree(place.output)
    shardmerge.merge(place.config())
    files = contents(place.output)
    with pytest.raises(OutputError, match="changed or damaged"):
        shardmerge.merge(plan, progress=damage)
    left = contents(place.output)
    assert {name: data for name, data in left.items() if not name.startswith(WORK)} == files


# --- what an error says of the model that is there --------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
@pytest.mark.parametrize("fault", ["source", "changed", "output", "format"])
def test_an_error_says_whether_the_old_model_is_whole(fault: str, overwrite: bool, place: Place) -> None:
    if overwrite:
        shardmerge.merge(place.config())
    before = contents(place.output) if overwrite else {}
    if fault == "format":
        broken(place)

    def harm(now: shardmerge.Progress) -> None:
        if now.shard_number != 2:
            return
        if fault == "changed":
            os.utime(place.base / SECOND, ns=(1, 1))
        if fault == "source":
            (place.base / SECOND).unlink(missing_ok=True)
        if fault == "output":
            shutil.rmtree(place.output / WORK / "receipts", ignore_errors=True)

    with pytest.raises(ShardmergeError) as caught:
        shardmerge.merge(place.config(), overwrite=overwrite, progress=harm)
    message = str(caught.value)
    assert ("The model that was there before is still whole" in message) == overwrite, message
    assert ("The output is not a model yet" in message) == (not overwrite and fault != "format"), message
    if overwrite:
        assert {name: data for name, data in contents(place.output).items() if not name.startswith(WORK)} == before


def test_an_error_in_the_commit_says_that_the_output_is_no_model(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Commit, aux: Any) -> dict[str, Any]:
        raise OutputError("no room")

    shardmerge.merge(place.config())
    monkeypatch.setattr(Commit, "_copy", fail)
    with pytest.raises(OutputError, match="The output is not a model yet"):
        shardmerge.merge(place.config(), overwrite=True)
    assert not (place.output / INDEX).exists()


def test_an_error_after_the_last_rename_says_that_the_files_are_in_place(place: Place) -> None:
    def fsync(descriptor: int) -> None:
        if (place.output / INDEX).exists():
            raise OSError(5, os.strerror(5))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OutputError, match="All files of the new model are in place"):
            shardmerge.merge(place.config())
    assert shardmerge.merge(place.config()).shards_reused == 2


# --- what the system refuses to say -----------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["missing", "finished", "unfinished"])
@pytest.mark.parametrize("call", ["statvfs", "access", "stat", "lstat", "listdir", "scandir", "open", "readlink"])
def test_what_the_system_refuses_at_plan_time_is_a_message(
    call: str, state: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    if state == "finished":
        shardmerge.merge(place.config())
    if state == "unfinished":
        stop_in_second(place)
    real, refused = getattr(os, call), []

    def refuse(path: Any = ".", *args: Any, **options: Any) -> Any:
        is_mine = options.get("dir_fd") is not None or isinstance(path, int) or str(path).startswith(str(place.output))
        if is_mine or (call in ("statvfs", "access") and str(path) == str(place.folder)):
            refused.append(path)
            raise OSError(5, os.strerror(5), path)
        return real(path, *args, **options)

    monkeypatch.setattr(os, call, refuse)
    try:
        shardmerge.plan(place.config(), overwrite=True)
    except PlanError as error:
        assert "output.path" in str(error) and "Input/output error" in str(error)
        assert refused
    else:  # what is found out without it
        assert call != "statvfs"


# --- files that were added --------------------------------------------------------------------------------------------

#: What transformers, PEFT, vLLM, llama.cpp, Ollama, MLX and sentence-transformers look for, and what may hide it.
LOADED = (
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors"),
    *("chat_template.json", "chat_template.j2", "chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja"),
    *("config.yaml", "params.json", "quantization_config.json", "quantize_config.json", "hf_quant_config.json"),
    *("modeling_evil.py", "sub/module.py", "custom_generate/generate.py", "requirements.txt"),
    *("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "spiece.model", "x.tiktoken"),
    *("preprocessor_config.json", "processor_config.json", "image_processor_config.json", "video_preprocessor.json"),
    *("model.safetensors", "consolidated.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", "x.pt"),
    *("model.safetensors.index.fp16.json", "model.fp16.safetensors", "x.gguf", "mmproj.gguf", "Modelfile", "template"),
    *("modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "original/params.json", ".env", "x"),
    *(
        ".hidden.json",
        "README.md.py",
        ".cache/x.json",
        "deep/.git/config",
        "notes.txt",
        "shardmerge.json.bak",
    ),
)
HARMLESS = (
    *(
        "README",
        "NOTICE.md",
        "docs/more.md",
        "LICENSE.txt",
        "USE_POLICY.md",
        "COPYING",
        "CHANGELOG.rst",
        "CITATION.cff",
    ),
    *(".gitattributes", ".gitignore", ".git/config", ".git/hooks/x.py", ".cache/huggingface/download/x.metadata"),
    *("images/loss.png", "a.JPG", "b.svg", ".DS_Store"),
)


@pytest.fixture
def finished(place: Place) -> Place:
    """A finished merge, of a base without files beside its weights."""
    shutil.rmtree(place.base)
    make_place(place.folder, aux={})
    shardmerge.merge(place.config())
    return place


def report_of(place: Place, **options: Any) -> Any:
    """What `verify` finds, right or wrong."""
    try:
        return shardmerge.verify(place.output, **options).raise_for_status()
    except shardmerge.VerifyError as error:
        assert error.exit_code == 6
        return error.report


def test_every_file_that_was_added_is_named(finished: Place) -> None:
    names = [*LOADED, "generation_config.json", "chat_template.jinja"]
    for name in names:
        path = finished.output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        report = report_of(finished)
        (problem,) = report.problems
        assert problem.file == name and f"{name} is not a file of this merge" in problem.text
        assert report.added == (name,) and report.to_json()["added"] == [name]
        path.unlink()
    for name in names:
        (finished.output / name).write_text("{}")
    report = report_of(finished)
    assert sorted(report.added) == sorted(names) and report.counts == {"structure": len(names)}
    code, message = invoke(finished, "verify", finished.output)
    assert code == 6 and f"{len(names)} problems" in message


def test_what_no_program_loads_is_a_note(finished: Place) -> None:
    for name in HARMLESS:
        path = finished.output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (finished.output / "empty" / "folder").mkdir(parents=True)
    report = report_of(finished)
    assert report.ok and report.complete and sorted(report.added) == sorted(HARMLESS)
    (note,) = report.notes
    assert note.startswith("not files of this merge") and "more" in note


@pytest.mark.parametrize("kind", [link_to_file, link_to_folder, link_to_nowhere, fifo, device])
@pytest.mark.parametrize("name", ["x.json", "sub", "deep/sub"])
def test_what_is_not_a_file_is_named_and_not_entered(
    name: str, kind: Callable[[Path, Place], None], finished: Place
) -> None:
    put(finished.output / name, kind, finished)
    report = report_of(finished)
    (problem,) = report.problems
    assert problem.file == name and ("(a FIFO)" if kind is fifo else "(a link)") in problem.text


@pytest.mark.parametrize("kind", [fifo, folder, link_to_nowhere, device])
def test_a_recorded_file_that_is_not_a_file_is_not_called_missing(
    kind: Callable[[Path, Place], None], place: Place
) -> None:
    shardmerge.merge(place.config())
    for name in json.loads((place.output / "shardmerge.json").read_text())["files"]:
        if name == "shardmerge.json":
            continue
        path = place.output / name
        kept = path.read_bytes()
        put(path, kind, place)
        texts = [problem.text for problem in report_of(place).problems if problem.file == name]
        assert texts and not any("missing" in text for text in texts), name
        shutil.rmtree(path) if kind is folder else path.unlink()
        path.write_bytes(kept)
    assert report_of(place).complete


def test_a_work_folder_that_was_left_behind_is_a_note(finished: Place) -> None:
    (finished.output / WORK / "stage").mkdir(parents=True)
    report = report_of(finished)
    assert report.ok and report.notes == (f"{WORK}, the work folder of a merge, was left behind; it may be removed",)


def test_what_could_not_be_compared_is_a_failure_unless_partial(finished: Place) -> None:
    shutil.rmtree(finished.base)
    code, message = invoke(finished, "verify", finished.output)
    assert code == 6 and "the base is not there" in message and "--partial" in message
    assert invoke(finished, "verify", finished.output, "--partial")[0] == 0
    with pytest.raises(shardmerge.VerifyError, match="untouched tensors: there is no base"):
        shardmerge.verify(finished.output).raise_for_status()
    report = shardmerge.verify(finished.output).raise_for_status(partial=True)
    assert report.ok and not report.complete
    assert any("touched tensors" in text for text in report.to_json()["unverified"])
    (finished.output / "evil.py").write_text("")
    assert invoke(finished, "verify", finished.output, "--partial")[0] == 6
