"""What happens when shared memory runs out, on a /dev/shm of its own that holds 8 MiB."""

import re
import signal

from allocator import RuntimeDir
from tests.allocator.backends.small_shm import on_own_shm


def test_a_full_device(runtime_dir: RuntimeDir) -> None:
    """An error that names the fix, and nothing is left of the attempt."""
    found = on_own_shm("segments", runtime_dir)
    # 5 MiB are used, 5 more are wanted.
    for where in ("commit", "reserve"):
        assert "it holds 8.4 MB, of which 3.1 MB are free" in found[where]
        assert re.search(r"remount,size=10M /dev/shm.*--shm-size 10m", found[where])
    # Of those that are free, 2 MiB are promised to somebody: 1 MiB fits beside them, 2 do not.
    assert "and 2.1 MB of those are promised already" in found["outstanding"]
    assert re.search(r"remount,size=9M /dev/shm", found["outstanding"])
    assert found["nothing_taken"]
    assert "/dev/shm can't give them" in found["write"]
    assert len(found["names"]) == 3  # two were never made


def test_a_pool_on_a_full_device(runtime_dir: RuntimeDir) -> None:
    found = on_own_shm("pool", runtime_dir)
    assert "it holds 8.4 MB, of which 2.1 MB are free" in found["map"]
    assert found["nothing_taken"]
    assert found["fault"] == signal.SIGSEGV  # and not SIGBUS: it is not mapped at all
    assert found["others"] == [1, 2, 3]
    assert found["after_discard"] == 4


def test_a_daemon_on_a_full_device(runtime_dir: RuntimeDir) -> None:
    """What is idle makes room, though not for what could never fit."""
    found = on_own_shm("daemon", runtime_dir)
    assert found["idle"] == "loaded"
    assert found["evicting"] == "loaded"
    assert found["after_evicting"] == ["new"]
    assert "are needed, but" in found["too_large"]
    assert found["after_too_large"] == ["new"]
    assert found["status"] == 0
    assert found["left"] == ["another program's"]


def test_what_others_take_between_a_promise_and_its_commit(runtime_dir: RuntimeDir) -> None:
    """What is idle goes for it, whether a client asks or not; where nothing is left to go, whoever
    was promised is told, and nothing that is in use is touched."""
    found = on_own_shm("shortage", runtime_dir)
    assert found["idle"] == "loaded"
    assert found["after_writing"] == ["new"]
    assert "6.3 MB are needed, but /dev/shm holds 8.4 MB in all" in found["beside_a_promise"]
    assert "3.1 MB of it are in use" in found["beside_a_promise"]
    assert found["before"] == ["idle"]  # a refusal changes nothing
    assert found["room"] == "Done"
    assert found["code"] == "out_of_device_memory"
    assert re.search(r"3.1 MB are needed.*remount,size=", found["no_room"])
    assert (found["status"], found["left"]) == (0, [])
