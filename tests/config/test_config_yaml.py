"""The config's YAML: keys given twice, tags, bombs, and anything else that a text can hold."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from shardmerge.config.schema import MergeConfig, load_yaml
from shardmerge.config.yaml_text import MAX_CONFIG_BYTES
from shardmerge.errors import ConfigError
from tests.support.builders import untimed
from tests.support.configs import BOUND, DATA, GOOD, from_text, refusal


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (GOOD + "base: other\n", "'base'"),
        (GOOD.replace("  path: merged", "  path: merged\n  path: other"), "'path'"),
        ("base: b\nadapters: [{path: a, path: b}]\noutput: {path: o}\n", "'path'"),
    ],
    ids=["top", "section", "in a list"],
)
def test_key_given_twice(tmp_path: Path, text: str, key: str) -> None:
    message = refusal(lambda: from_text(tmp_path, text))
    assert f"the key {key} stands twice" in message
    assert "line" in message


def test_tag_is_refused_and_not_obeyed(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    text = f"base: !!python/object/apply:os.system ['touch {witness}']\n"
    assert "could not determine a constructor for the tag" in refusal(lambda: from_text(tmp_path, text))
    assert not witness.exists()


@pytest.mark.parametrize(
    "text",
    [
        "base: !!python/name:os.system\n",
        "base: !!python/object/new:os.system [x]\n",
        "base: !mine x\n",
        "base: !!int x\n",
        "base: !!int ''\n",
        "base: !!float x\n",
        "base: !!bool x\n",
        "base: !!timestamp x\n",
        "base: !!binary é\n",
        "base: =\n",
        "base: " + "9" * 5000 + "\n",
        "[a]: b\n",
        "{a: b}: c\n",
        "<<: {base: b}\n",
        "base: &a [*a]\n",
        "base: &a {x: *a}\n",
        "base: *nothing\n",
        "base: [\n",
        "base: 'x\n",
        "base:\tx: y\n",
        "a: 1\n---\nb: 2\n",
        "[" * 1500,
        "{a: " * 1500,
        b"base: \xff\n",
        b"base: \x00\n",
    ],
    ids=lambda text: repr(text)[:40],
)
def test_not_valid_yaml(tmp_path: Path, text: str | bytes) -> None:
    message = refusal(lambda: from_text(tmp_path, text))
    assert message.startswith(f"{tmp_path / 'config.yaml'}: not valid YAML: ")
    assert len(message) < BOUND


@pytest.mark.parametrize("text", ["", "- a\n", "text\n", "7\n", "null\n"], ids=repr)
def test_no_mapping(tmp_path: Path, text: str) -> None:
    assert "a config is a mapping with the keys base, adapters, output" in refusal(lambda: from_text(tmp_path, text))


def test_not_there(tmp_path: Path) -> None:
    assert "no.yaml: the config cannot be read: No such file" in refusal(
        lambda: MergeConfig.from_file(tmp_path / "no.yaml")
    )
    assert "cannot be read" in refusal(lambda: MergeConfig.from_file(tmp_path))


def test_too_long(tmp_path: Path) -> None:
    fits = GOOD + "#" * (MAX_CONFIG_BYTES - len(GOOD))
    assert from_text(tmp_path, fits) == MergeConfig.from_dict(DATA)
    assert "this is not a config" in refusal(lambda: from_text(tmp_path, fits + "#"))


# --- what YAML would make of a value ----------------------------------------------------------------------------------

#: Numbers to YAML 1.1 that are other numbers, or words, to YAML 1.2 and to whoever wrote them.
SURPRISES: tuple[str, ...] = (
    "1:30",
    "190:20:30",
    "1:30.5",
    "0777",
    "-012",
    "00",
    "0x1F",
    "0b101",
    "1_000",
    "1_0.5",
    "1__",
    ".inf",
)
SURPRISES += ("-.INF", ".nan", ".NaN", "00.5", "01.5")
NUMBERS = ("output.max_shard_size", "output.seed", "compute.max_memory")
OF_ADAPTER = ("adapters.0.weight", "adapters.0.alpha", "adapters.0.scaling")
TEXTS = ("base", "adapters.0.path", "adapters.0.prefix", "output.path")


def value_of(config: MergeConfig, key: str) -> Any:
    value: Any = config
    for step in key.split("."):
        value = value[int(step)] if step.isdecimal() else getattr(value, step)
    return value


def with_value(folder: Path, key: str, text: str) -> MergeConfig:
    """The config that has ``text`` at a key, in its file and again by an override: both must say the same."""
    section, _, last = key.rpartition(".")
    adapter = f"[{{path: a, {last}: {text}}}]" if section == "adapters.0" and last != "path" else "[{path: a}]"
    lines = {"base": "b", "adapters": adapter, "output": "{path: o}"}
    if section == "adapters.0" and last == "path":
        lines["adapters"] = f"[{{path: {text}}}]"
    elif section and section != "adapters.0":
        lines[section] = (
            f"{{path: o, {last}: {text}}}" if (section, last) == ("output", last) else f"{{{last}: {text}}}"
        )
        if key == "output.path":
            lines[section] = f"{{path: {text}}}"
    elif not section:
        lines[key] = text
    needed = ["output.rounding=stochastic"] if key == "output.seed" else []
    config = from_text(folder, "".join(f"{name}: {value}\n" for name, value in lines.items()), needed)
    assert value_of(from_text(folder, GOOD, [*needed, f"{key}={text}"]), key) == value_of(config, key)
    return config


@pytest.mark.parametrize("text", SURPRISES)
def test_number_that_is_another_to_others(tmp_path: Path, text: str) -> None:
    """Refused wherever it stands, plain; in quotes it is a text, which is a path, and no number."""
    for key in (*NUMBERS, *OF_ADAPTER, *TEXTS):
        message = refusal(lambda key=key: with_value(tmp_path, key, text))  # type: ignore[misc]
        assert f"{text!r} is not a plain decimal number" in message
        message = refusal(lambda key=key: from_text(tmp_path, GOOD, [f"{key}={text}"]))  # type: ignore[misc]
        assert f"-s {key}: not valid YAML: {text!r} is not a plain decimal number" in message
    for key in TEXTS:
        assert value_of(with_value(tmp_path, key, f'"{text}"'), key) == text
    for key in (*NUMBERS, *OF_ADAPTER):
        assert key in refusal(lambda key=key: with_value(tmp_path, key, f'"{text}"'))  # type: ignore[misc]


@pytest.mark.parametrize("text", ["on", "Off", "yes", "NO", "2020-01-02", "2020-13-45", "2020-01-02 03:04:05", "0o17"])
def test_word_stays_a_word(tmp_path: Path, text: str) -> None:
    """YAML 1.1 makes flags and dates of these; where a word is expected they are words, and numbers they are not."""
    for key in TEXTS:
        assert value_of(with_value(tmp_path, key, text), key) == text
    for key in (*NUMBERS, *OF_ADAPTER):
        assert key in refusal(lambda key=key: with_value(tmp_path, key, text))  # type: ignore[misc]


@pytest.mark.parametrize("text", ["true", "false", "7", "1.5", "null"])
def test_flag_or_number_is_no_word(tmp_path: Path, text: str) -> None:
    """Neither a path nor another kind of number is made of it."""
    for key in ("base", "adapters.0.path", "output.path"):
        assert f"{key}: " in refusal(lambda key=key: with_value(tmp_path, key, text))  # type: ignore[misc]
    if text in ("true", "false"):
        for key in (*NUMBERS, *OF_ADAPTER):
            assert key in refusal(lambda key=key: with_value(tmp_path, key, text))  # type: ignore[misc]


def test_flags(tmp_path: Path) -> None:
    for text, flag in {"true": True, "yes": True, "On": True, "FALSE": False, "no": False, "off": False}.items():
        assert with_value(tmp_path, "output.sha256", text).output.sha256 is flag
    for text in ("2", "0.5", "maybe", "2020-01-02"):
        assert "output.sha256" in refusal(lambda text=text: with_value(tmp_path, "output.sha256", text))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        *(("adapters.0.weight", text, value) for text, value in (("1e-3", 1e-3), ("+0.5", 0.5), (".5", 0.5))),
        *(("adapters.0.weight", text, value) for text, value in (("-2", -2.0), ("0.1", 0.1), ("1.5e+3", 1500.0))),
        *(("output.seed", text, value) for text, value in (("0", 0), ("42", 42), ('"42"', 42))),
        *(("compute.max_memory", text, value) for text, value in (("5.0", 5), ("1.5KiB", 1536), ("512000", 512_000))),
    ],
)
def test_plain_numbers(tmp_path: Path, key: str, text: str, value: float) -> None:
    assert value_of(with_value(tmp_path, key, text), key) == value


@pytest.mark.parametrize("text", ["true-merged", "falsehood", "True North", "on", "no", "2020-01-02", "12:30", "1e3x"])
def test_a_folder_s_name_stays_what_it_is(tmp_path: Path, text: str) -> None:
    if text == "12:30":
        assert "not a plain decimal number" in refusal(lambda: with_value(tmp_path, "output.path", text))
    else:
        assert with_value(tmp_path, "output.path", text).output.path == text


@pytest.mark.parametrize("text", ["1.5", "0777B", "٣GB", "0.5", "1e9"])
def test_size_that_is_none(tmp_path: Path, text: str) -> None:
    assert "is not a size" in refusal(lambda: with_value(tmp_path, "output.max_shard_size", text))


# --- bombs ------------------------------------------------------------------------------------------------------------


def alias_bomb(depth: int, width: int = 9) -> str:
    """Lists of lists of lists: ``width ** depth`` items in a few lines; the last is ``*bomb``."""
    lines = [f"a0: &a0 [{', '.join('x' * width)}]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, depth - 1)]
    return "\n".join([*lines, f"a: &bomb [{', '.join([f'*a{depth - 2}'] * width)}]", ""])


@pytest.mark.parametrize(
    "use",
    [
        "base: *bomb\n",
        "adapters: *bomb\n",
        "adapters: [{path: a, weight: *bomb}]\n",
        "output: *bomb\n",
        "output: {path: o, max_shard_size: *bomb}\n",
        "compute: {max_memory: *bomb}\n",
        "output: {path: *bomb, dtype: *bomb}\n",
    ],
    ids=lambda use: use.strip(),
)
def test_alias_bomb_stays_small(tmp_path: Path, use: str) -> None:
    """Six levels, which end even where they are written out; forty would not."""
    message = refusal(lambda: from_text(tmp_path, alias_bomb(6) + use))
    assert len(message) < BOUND


def test_alias_bomb_that_could_not_be_written_out(tmp_path: Path) -> None:
    assert len(refusal(lambda: from_text(tmp_path, alias_bomb(40) + "base: *bomb\n"))) < BOUND


def test_bomb_as_a_key(tmp_path: Path) -> None:
    message = refusal(lambda: from_text(tmp_path, alias_bomb(6) + "? *bomb\n: 1\n? *bomb\n: 2\n"))
    assert len(message) < BOUND


def test_merge_key_bomb(tmp_path: Path) -> None:
    lines = ["a0: &a0 {k: v}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 30)]
    message = refusal(lambda: from_text(tmp_path, "\n".join(lines)))
    assert len(message) < BOUND


def test_many_unknown_keys(tmp_path: Path) -> None:
    message = refusal(lambda: from_text(tmp_path, GOOD + "".join(f"k{number}: 1\n" for number in range(3000))))
    assert "k0: there is no such key" in message
    assert len(message) < BOUND


def test_long_values_are_cut(tmp_path: Path) -> None:
    long = "y" * 100_000
    message = refusal(lambda: from_text(tmp_path, f"base: b\nadapters: a\noutput: {{path: o, dtype: {long}}}\n"))
    assert len(message) < BOUND
    message = refusal(lambda: from_text(tmp_path, f"base: b\nadapters: a\noutput: {{path: o, {long}: 1}}\n"))
    assert len(message) < BOUND
    message = refusal(lambda: from_text(tmp_path, GOOD + f"compute: {{max_memory: {long}}}\n"))
    assert len(message) < BOUND


class CountedKey(str):
    """A string that counts how often it is compared."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        CountedKey.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_keys_are_compared_a_few_times_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A mapping of many keys takes a time in proportion to their number."""
    count = 2000
    construct = yaml.SafeLoader.construct_scalar
    monkeypatch.setattr(yaml.SafeLoader, "construct_scalar", lambda loader, node: CountedKey(construct(loader, node)))
    CountedKey.compared = 0
    path = tmp_path / "config.yaml"
    path.write_text("".join(f"key{number}: x\n" for number in range(count)))
    assert len(load_yaml(path)) == count
    assert CountedKey.compared < 100 * count


# --- anything ---------------------------------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.dates()
    | st.binary(max_size=4)
    | st.sampled_from(["same", "auto", "5GB", "float32", "cuda:0", "9" * 400, 10**400, datetime.datetime.min])
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3),
    max_leaves=8,
)
SECTIONS = {
    "base": st.just("b") | ANYTHING,
    "adapters": st.just("a")
    | st.lists(
        st.fixed_dictionaries({"path": st.just("a")}, optional=dict.fromkeys(("weight", "alpha", "scaling"), ANYTHING)),
        max_size=2,
    )
    | ANYTHING,
    "output": st.fixed_dictionaries({"path": st.just("o")}, optional={"dtype": ANYTHING, "max_shard_size": ANYTHING})
    | ANYTHING,
    "compute": st.fixed_dictionaries({}, optional=dict.fromkeys(("device", "dtype", "max_memory"), ANYTHING))
    | ANYTHING,
    "other": ANYTHING,
}
CONFIGS = st.fixed_dictionaries({}, optional=SECTIONS)


def config_or_error(action: Any) -> None:
    try:
        config = action()
    except ConfigError as error:
        str(error).encode()
        assert len(str(error)) < BOUND
    else:
        assert isinstance(config, MergeConfig)
        assert MergeConfig.from_dict(config.model_dump(mode="json")) == config


@untimed
@given(CONFIGS)
def test_any_mapping(value: dict[str, Any]) -> None:
    config_or_error(lambda: MergeConfig.from_dict(value))


@untimed
@given(value=CONFIGS, overrides=st.lists(st.text(max_size=30) | st.from_regex(r"[a-z0-9.]{1,20}=.{0,12}"), max_size=3))
def test_any_yaml(tmp_path_factory: pytest.TempPathFactory, value: dict[str, Any], overrides: list[str]) -> None:
    folder = tmp_path_factory.getbasetemp()
    text = yaml.safe_dump(value, allow_unicode=True)
    config_or_error(lambda: from_text(folder, text, overrides))


@untimed
@given(st.text(alphabet="ab:-[]{}&*!<>?|'\"#,%@=0123456789.\n\t ", max_size=60) | st.binary(max_size=40))
def test_any_text(tmp_path_factory: pytest.TempPathFactory, text: str | bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    config_or_error(lambda: from_text(folder, text))
