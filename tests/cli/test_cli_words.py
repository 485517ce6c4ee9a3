"""An export does not speak of merges; a warning is called one, a note another."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import shardmerge
from shardmerge.cli.main import cli
from shardmerge.reporting.text import labelled
from shardmerge.spec.notices import Warned, prefixed, severity
from tests.support.builders import (
    Place,
    llama_tensors,
    make_place,
    model_config,
    peft_config,
    peft_tensors,
    write_base,
    write_json,
    write_peft,
)


def export(place: Place, *options: str | Path) -> Result:
    return CliRunner().invoke(cli, ["export", str(place.base), "-o", str(place.output), *map(str, options)])


def said(result: Result, *but: str | Path) -> str:
    """All that was printed, without our name and without paths."""
    text = result.stdout + result.stderr
    for word in (*map(str, but), "shardmerge"):
        text = text.replace(word, "")
    return text


def of_merges(text: str) -> list[str]:
    return re.findall(r".*merg.*", text, re.IGNORECASE)


def finished(place: Place) -> None:
    assert export(place).exit_code == 0


def overflowing(place: Place) -> None:
    write_base(place.base, llama_tensors() | {"model.norm.weight": torch.full((32,), 1e38)})


def unfinished(place: Place) -> None:
    def stop(progress: shardmerge.Progress) -> None:
        if progress.shard_number == 2:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        shardmerge.merge(place.config(), progress=stop)


def two_models(place: Place) -> None:
    write_base(place.base, llama_tensors(), shards=1)
    tensors = {name: tensor + 1 for name, tensor in llama_tensors().items()}
    write_base(place.base, tensors)


def nothing(place: Place) -> None:
    pass


@pytest.mark.parametrize(
    ("prepare", "options", "code"),
    [
        (nothing, ["-v"], 0),
        (nothing, ["--json"], 0),
        (finished, [], 3),
        (lambda place: place.output.write_text(""), [], 3),
        (lambda place: (place.base / "config.json").write_text("{"), [], 4),
        (lambda place: (place.base / "model-00001-of-00002.safetensors").write_bytes(b"x"), [], 4),
        (overflowing, ["--dtype", "float16"], 4),
        (unfinished, [], 7),
        (two_models, [], 4),
        (nothing, ["--max-shard-size", "nothing"], 2),
    ],
    ids=["done", "json", "again", "file", "config", "header", "overflow", "other work", "two models", "size"],
)
def test_an_export_does_not_speak_of_merges(
    tmp_path: Path, prepare: Callable[[Place], object], options: list[str], code: int
) -> None:
    place = make_place(tmp_path)
    prepare(place)
    result = export(place, *options)
    assert result.exit_code == code, result.output
    text = said(result, place.output, place.base, tmp_path, '"merged_bytes"', '"merged_dtype"')
    assert not of_merges(text)
    assert code != 3 or "the export is refused" in text


def test_the_words_of_an_export(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    done = export(place)
    assert f"{place.output}: exported" in done.stdout and "exporting: 100%" in done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[2:4]] == ["model", "exported"]
    assert "already holds a finished export" in export(place).stderr
    report = shardmerge.merge(place.config(), overwrite=True)
    assert report.kind == "merge"


def test_a_plan_is_a_merges(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    write_json(place.adapter / "adapter_config.json", peft_config(peft_type="NEW"))
    assert "the merge is refused" in CliRunner().invoke(cli, ["plan", str(place.config_file())]).stderr


# --- warnings and notes ----------------------------------------------------------------------------------------------


def test_notices() -> None:
    warning = Warned("a\nb")
    assert (labelled(warning), labelled("c")) == ("warning: a\\nb", "note: c")
    assert severity(prefixed("adapter x: ", warning)) == "warning" and severity(prefixed("x: ", "c")) == "note"
    assert severity(pickle.loads(pickle.dumps(warning))) == "warning" and json.dumps(warning) == '"a\\nb"'


def test_both_where_they_are_printed(tmp_path: Path) -> None:
    """Another base than the adapter names is a warning; what it does not need of another trainer's settings a note."""
    place = make_place(tmp_path, config=model_config(_name_or_path="org/base"))
    config = peft_config(base_model_name_or_path="org/other", learning_rate=0.1)
    write_peft(place.adapter, peft_tensors(), config=config)
    expected = [("warning", "trained on org/other"), ("note", "another program's training")]
    for command in ("plan", "run"):
        result = CliRunner().invoke(cli, [command, str(place.config_file()), "--overwrite"])
        assert result.exit_code == 0, result.output
        text = result.stdout + result.stderr
        for severity_, words in expected:
            assert re.search(rf"^{severity_}: .*{words}", text, re.MULTILINE), text
        as_json = json.loads(
            CliRunner().invoke(cli, [command, str(place.config_file()), "--json", "--overwrite"]).stdout
        )
        assert [notice["text"] for notice in as_json["notices"]] == as_json["warnings"]
        assert sorted({notice["severity"] for notice in as_json["notices"]}) == ["note", "warning"]


def test_the_plan_has_no_digest_for_people(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    assert "\ndigest" not in CliRunner().invoke(cli, ["plan", str(place.config_file())]).stdout
