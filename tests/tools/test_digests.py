"""The digests by which two commits are compared: the same code has the same, and other bytes have others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.digest_cases import CASES
from tools.digest_tables import ADAPTERS, BASES
from tools.digests import Work, digest_of_files, digest_of_records, main

#: Cases whose inputs are made without transformers and PEFT, which take seconds to be imported.
QUICK = ("mlx", "pure-alpha", "refused-key")


def lines(work: Path, capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    arguments = [argument for name in QUICK for argument in ("--only", name)]
    assert main(["--work", str(work), *arguments, *options]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_two_runs_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = lines(tmp_path, capsys)
    second = lines(tmp_path, capsys, "--keep")
    assert first == second
    fields = {name: rest for name, *rest in map(str.split, first)}
    assert sorted(fields) == sorted(QUICK)
    assert fields["refused-key"] == ["2", "-", "-"]
    digests = [digest for name in ("mlx", "pure-alpha") for digest in fields[name][1:]]
    assert len({*digests}) == 4, "two digests are the same"
    work = Work(tmp_path)
    output = tmp_path / "outputs" / "mlx"
    assert [digest_of_files(output), digest_of_records(output, work)] == fields["mlx"][1:]

    shard = next(output.rglob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert digest_of_files(output) != fields["mlx"][1]

    file = output / "merged" / "shardmerge.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "seconds": record["seconds"] + 1}))
    assert digest_of_records(output, work) == fields["mlx"][2]
    file.write_text(json.dumps({**record, "files": record["files"][1:]}))
    assert digest_of_records(output, work) != fields["mlx"][2]


def test_names() -> None:
    names = [case.name for case in CASES]
    assert len({*names}) == len(names)
    assert {case.base for case in CASES} | {adapter.base for adapter in ADAPTERS.values()} == BASES.keys()
    assert {name for case in CASES for name in case.adapter_names()} == ADAPTERS.keys()


def test_a_folder_without_the_package_is_no_checkout(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is not a checkout of shardmerge"):
        main(["--work", str(tmp_path / "work"), "--checkout", str(tmp_path), "--only", "mlx"])
