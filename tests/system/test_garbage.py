"""What is left to the garbage collector, in processes of their own, since what is frozen stays so."""

from __future__ import annotations

import gc

import pytest

from shardmerge.system.garbage import no_garbage_collection
from tests.support.builders import run_python

#: Many objects are made; then some more, as of which Python would look through all of them.
_CODE = """
import gc
from shardmerge.system.garbage import no_garbage_collection, process_is_ours

passes = []
gc.callbacks.append(lambda phase, about: passes.append(about["generation"]))
{}
with no_garbage_collection():
    made = [[] for _ in range(200_000)]
    assert not gc.isenabled()
before = len(passes)
more = [[] for _ in range(2_000)]
print(gc.isenabled(), gc.get_freeze_count() >= 200_000, len(passes) > before)
"""


@pytest.mark.parametrize(("says", "frozen"), [("", False), ("process_is_ours()", True)])
def test_what_was_made_meanwhile_is_left_alone_in_a_process_of_ours_only(says: str, frozen: bool) -> None:
    done = run_python("-c", _CODE.format(says))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", str(frozen), "True"]


@pytest.mark.parametrize("enabled", [True, False])
def test_it_is_as_it_was_afterwards(enabled: bool) -> None:
    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ZeroDivisionError), no_garbage_collection():
            assert not gc.isenabled()
            _ = 1 / 0
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was else gc.disable)()
