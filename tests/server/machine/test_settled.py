"""A proof of figures that change while they are read."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from server.machine.process_memory import ProcessMemory, SegmentMapping
from server.machine.proof import settled
from server.machine.verify import Verdict, judge

SIZE = 96 << 20


def verdict(*shares: int) -> Verdict:
    """On as many instances, each of which has such a share of the weights."""
    mapping = SegmentMapping(
        name="/onecopy-w",
        inode="00:1a:77",
        mapped_bytes=SIZE,
        resident_bytes=SIZE,
        pss_bytes=0,
        writable=False,
        shared=True,
    )
    memories = [
        ProcessMemory(
            pid=number,
            segments=(replace(mapping, pss_bytes=share),),
            kv_bytes=0,
            private_parts={},
            pss_bytes=share,
        )
        for number, share in enumerate(shares, 1)
    ]
    return judge("/onecopy-w", SIZE, [(f"i{one.pid}", one) for one in memories])


def looks(*verdicts: Verdict) -> tuple[Callable[[], Verdict], Iterator[Verdict]]:
    left = iter(verdicts)
    return lambda: next(left), left


def test_shares_that_were_read_while_another_began_are_read_again() -> None:
    began, touched = verdict(SIZE // 2, SIZE // 2, SIZE // 3), verdict(*[SIZE // 3] * 3)
    assert not began.holds
    look, left = looks(began, touched, began)
    assert settled(look, lambda: None).holds
    assert list(left) == [began]  # no look more than is needed


def test_what_does_not_change_does_not_hold() -> None:
    copied = verdict(SIZE, SIZE)
    look, left = looks(copied, copied, verdict(SIZE // 2, SIZE // 2))
    assert settled(look, lambda: None).problems == ["the weights are counted 2.00 times"]
    assert len(list(left)) == 1


def test_what_always_changes_is_given_up() -> None:
    shares = iter(range(SIZE, 2 * SIZE))
    assert not settled(lambda: verdict(next(shares), SIZE), lambda: None).holds
