"""transformers' conversions, applied to views: from stored tensors to tensors in memory, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shardmerge.key_mapping import pieces
from shardmerge.key_mapping.index import Group
from shardmerge.key_mapping.pieces import RefusalError, View
from shardmerge.key_mapping.rules import Rule

#: Views by source or by target; several where a source stands for one tensor per expert.
_State = list[list[View]]


def convert_group(group: Group, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> list[View]:
    """The tensors in memory, one per target, from all stored tensors of one conversion. Raises `RefusalError`."""
    if group.unclear:
        raise RefusalError("it is not clear how its stored parts belong together")
    sources: list[list[View]] = []
    for i, names in enumerate(group.sources):
        numbers = sorted(names)
        if not numbers:
            raise RefusalError(f"the base stores it in parts, and lacks {group.rule.sources[i]}")
        if numbers != [-1] and numbers != list(range(len(numbers))):
            some = ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")
            raise RefusalError(f"some of its experts on disk are missing (there are {some})")
        found = [(names[number], shapes[names[number]]) for number in numbers]
        sources.append([pieces.stored(name, shape, _is_stack(group.rule, len(shape))) for name, shape in found])
    return convert(group.rule, sources, config)


def _is_stack(rule: Rule, ndim: int) -> bool:
    """Whether a source with ``ndim`` dimensions is a stack (E, …), inside of which the rule works."""
    name, *arguments = rule.operations[0]
    return ndim == 3 and name in ("concat", "chunk", "interleave", "transpose") and arguments[0] >= 1


def convert(rule: Rule, sources: Sequence[Sequence[View]], config: Mapping[str, Any]) -> list[View]:
    """The tensors in memory, one per target, from the stored ones, a list per source. Raises `RefusalError`."""
    state: _State = [list(views) for views in sources]
    for name, *arguments in rule.operations:
        if name == "merge":
            state = [[pieces.stack(views)] for views in state]
        elif name == "concat":
            state = [[pieces.concatenate([view for views in state for view in views], arguments[0])]]
        elif name == "chunk":
            state = [[part] for part in pieces.chunk(_only(state), len(rule.targets), arguments[0])]
        elif name == "split":
            view = _only(state)
            sizes = _sizes(view.rows, arguments[1:], config)
            state = [[part] for part in pieces.split(view, sizes, arguments[0])]
        elif name == "ernie":
            state = _fuse_kinds(state, len(rule.targets))
        else:
            state = _one_by_one(state, name, arguments, config, forward=True)
    if any(len(views) != 1 for views in state) or len(state) != len(rule.targets):
        raise RefusalError("it is stored in more parts than the conversion knows")
    return [views[0] for views in state]


def revert(rule: Rule, targets: Sequence[View], source: int, member: int | None, config: Mapping[str, Any]) -> View:
    """One source of the conversion, or one expert of it, from its targets. Raises `RefusalError`."""
    state: _State = [[view] for view in targets]
    for name, *arguments in reversed(rule.operations):
        if name == "merge":
            state = [[pieces.unstack(view, _number(member)) for view in views] for views in state]
        elif name == "concat":
            # Two parts are gate and up, of equal size. More parts (q, k, v) may differ in size.
            if len(rule.sources) != 2:
                raise RefusalError("the base joins what it is a part of, and the sizes of the parts are not known")
            state = [[part] for part in pieces.chunk(_only(state), 2, arguments[0])]
        elif name in ("chunk", "split"):
            state = [[pieces.concatenate([views[0] for views in state], arguments[0])]]
        elif name == "ernie":
            state = _part_of_kinds(state, len(rule.sources), _number(member))
        else:
            state = _one_by_one(state, name, arguments, config, forward=False)
    return state[source][0]


def _only(state: _State) -> View:
    if len(state) != 1 or len(state[0]) != 1:
        raise RefusalError("it is stored in more parts than the conversion knows")
    return state[0][0]


def _number(member: int | None) -> int:
    if member is None:
        raise RefusalError("the name does not say which expert it is")
    return member


def _one_by_one(state: _State, name: str, arguments: list[Any], config: Mapping[str, Any], *, forward: bool) -> _State:
    """Apply an operation to each tensor by itself."""
    if name == "rope":
        key, chosen = arguments
        return [
            [_rope(view, key, config, forward=forward) if chosen is None or chosen[i] else view for view in views]
            for i, views in enumerate(state)
        ]
    if name == "interleave":
        return [[_interleave(view, arguments[0], inverse=forward == arguments[1]) for view in views] for views in state]
    if name == "transpose":
        return [[_transpose(view, *arguments, config=config, forward=forward) for view in views] for views in state]
    raise RefusalError(f"it is converted in a way that is not supported ({name})")


def _interleave(view: View, axis: int, *, inverse: bool) -> View:
    if view.rows % 2:
        raise RefusalError("it has an odd number of rows, which are interleaved in pairs")
    half = view.rows // 2
    return pieces.shuffle(view, 1, *((2, half) if inverse else (half, 2)), axis)


def _rope(view: View, key: str | None, config: Mapping[str, Any], *, forward: bool) -> View:
    part = config.get(key) if key else None
    heads = _integer(part if isinstance(part, Mapping) else config, "num_attention_heads")
    if view.rows % (2 * heads):
        raise RefusalError(f"its {view.rows} rows are not pairs in {heads} heads")
    half = view.rows // heads // 2
    return pieces.shuffle(view, heads, *((half, 2) if forward else (2, half)), 0)


def _transpose(
    view: View, axis: int, other: int, checked: int | None, *, config: Mapping[str, Any], forward: bool
) -> View:
    """Swap two dimensions; with ``checked``, only if that dimension is not the hidden size already."""
    if checked is None:
        return pieces.transpose(view, axis, other)
    if not forward:
        raise RefusalError("whether it was transposed on disk is not known")
    text = config.get("text_config")
    hidden = _integer(text if isinstance(text, Mapping) else config, "hidden_size")
    if len(view.shape) != 3 or hidden not in view.shape[1:]:
        raise RefusalError(f"no dimension of {list(view.shape)} is the hidden size, {hidden}")
    return view if view.shape[checked] == hidden else pieces.transpose(view, axis, other)


def _sizes(rows: int, fields: Sequence[str], config: Mapping[str, Any]) -> list[int]:
    """Split a number of rows in the proportions of the config's fields."""
    text = config.get("text_config")
    weights = [_integer(text if isinstance(text, Mapping) else config, field) for field in fields]
    if rows % sum(weights):
        raise RefusalError(f"its {rows} rows cannot be cut as {' : '.join(map(str, weights))}")
    return [rows // sum(weights) * weight for weight in weights]


def _fuse_kinds(state: _State, kinds: int) -> _State:
    """Split each source's experts into kinds (text, vision), stack them, and join the sources of a kind by rows."""
    size = -(-len(state[0]) // kinds)
    return [
        [pieces.concatenate([pieces.stack(views[kind * size : (kind + 1) * size]) for views in state], 1)]
        for kind in range(kinds)
    ]


def _part_of_kinds(state: _State, sources: int, member: int) -> _State:
    for views in state:
        view = views[0]
        if member < view.shape[0]:
            return [[pieces.unstack(part, member)] for part in pieces.chunk(view, sources, 1)]
        member -= view.shape[0]
    raise RefusalError("there is no such expert")


def _integer(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise RefusalError(f"config.json does not say {key}")
    return value
