"""The sums behind `onecopy plan`, and where they say that something no longer fits.

Expected figures are worked out here by hand; each limit is shown to hold and to give way one byte
further on.
"""

from pathlib import Path
from typing import Any

import pytest

from server.console.plan import plan_lines
from server.machine.capacity import Held, Machine, read_machine
from server.machine.plan import (
    ATTACHED_PRIVATE_BYTES,
    HEAP_GROWTH_BYTES,
    LOADING_PRIVATE_BYTES,
    MAX_INSTANCES,
    MAX_NUM_SEQS,
    OTHER_PROCESSES_BYTES,
    Load,
    Plan,
    make_plan,
)
from workers.messages import Estimate, OffloadEstimate, RankEstimate

MB = 1_000_000
RANK = RankEstimate(
    column_bytes=300 * MB,
    row_bytes=150 * MB,
    replicated_bytes=100 * MB,
    segment_bytes=551 * MB,
    kv_bytes_per_token=10_000,
    kv_bytes_per_sequence=10 * MB,
)


def plan(
    memory_bytes: int = 10_000 * MB,
    shared_memory_bytes: int | None = None,
    size: int = 1,
    given: bool = True,
    embeds: bool = False,
    sequence_bytes: int = 20 * MB,
    offload: OffloadEstimate | None = None,
    sums_bytes: int = 0,
    **load: int,
) -> Plan:
    """1 GB of weights, 20 MB a sequence unless it `embeds`, 40 MB a step."""
    estimate = Estimate(
        architecture="TinyForCausalLM",
        dtype="bfloat16",
        num_parameters=500 * MB,
        num_tensors=12,
        max_model_len=1024,
        segment_bytes=1000 * MB,
        kv_bytes_per_token=0 if embeds else 20_000,
        kv_bytes_per_sequence=0 if embeds else sequence_bytes,
        prefill_bytes=40 * MB,
        logits_bytes_per_sequence=MB,
        sums_bytes=sums_bytes,
        rank=RANK if size > 1 else None,
        offload=offload,
    )
    asked: dict[str, Any] = {"num_instances": 2, "max_num_seqs": 4, **load}
    shared = memory_bytes if shared_memory_bytes is None else shared_memory_bytes
    return make_plan(
        "tiny",
        Path("/models/tiny"),
        estimate,
        Load(max_model_len=1024, tensor_parallel_size=size, **asked),
        Machine(memory_bytes, shared, given),
    )


def test_weights_count_once_and_everything_else_as_often_as_it_is_there() -> None:
    device = plan(num_instances=3).device
    private = LOADING_PRIVATE_BYTES + 2 * ATTACHED_PRIVATE_BYTES
    busy = 3 * (HEAP_GROWTH_BYTES + 40 * MB)
    assert device.weights_bytes == 1000 * MB
    assert device.total_bytes_at_start == 1000 * MB + private
    assert device.kv_bytes_at_full_load == 3 * 4 * 20 * MB
    assert device.private_bytes_at_full_load == private + busy
    assert device.total_bytes_at_full_load == 1000 * MB + 240 * MB + private + busy


def test_the_logits_of_many_sequences_may_take_more_than_a_prompt() -> None:
    assert plan(max_num_seqs=40).busy_private_bytes == HEAP_GROWTH_BYTES + 40 * MB
    assert plan(max_num_seqs=41).busy_private_bytes == HEAP_GROWTH_BYTES + 41 * MB


def test_ranks_on_one_device_share_weights_and_keys_but_not_processes() -> None:
    alone, split = plan().device, plan(size=2).device
    assert split.weights_bytes == alone.weights_bytes
    assert split.kv_bytes_at_full_load == alone.kv_bytes_at_full_load
    further = split.private_bytes_at_start - alone.private_bytes_at_start
    assert further == 2 * ATTACHED_PRIVATE_BYTES


def test_ranks_that_divide_sequences_are_processes_with_sums_in_common() -> None:
    alone, divided = plan().device, plan(data_parallel_size=3, sums_bytes=5 * MB).device
    assert divided.sums_bytes == 2 * 5 * MB  # of each instance
    further = divided.total_bytes_at_start - alone.total_bytes_at_start
    assert further == 2 * 5 * MB + 4 * ATTACHED_PRIVATE_BYTES
    at_work = divided.total_bytes_at_full_load - alone.total_bytes_at_full_load
    assert at_work == further + 4 * (HEAP_GROWTH_BYTES + 40 * MB)
    tight = {"data_parallel_size": 3, "sums_bytes": 5 * MB}
    assert plan(shared_memory_bytes=1170 * MB, **tight).room.fits_at_full_load  # type: ignore[arg-type]
    assert not plan(shared_memory_bytes=1170 * MB - 1, **tight).room.fits_at_full_load  # type: ignore[arg-type]


def test_ranks_on_devices_of_their_own_hold_their_share() -> None:
    made = plan(size=2)
    assert made.rank_device is not None
    assert made.rank_device.weights_bytes == 551 * MB
    assert made.rank_device.kv_bytes_at_full_load == 2 * 4 * 10 * MB
    assert made.rank_device.private_bytes_at_start == plan().device.private_bytes_at_start
    assert made.split is not None
    assert made.split.column_bytes + made.split.row_bytes == 900 * MB
    assert made.rank_room is not None
    assert plan(size=2, given=False).rank_room is None  # this machine is one device, not two


def test_it_fits_to_the_byte() -> None:
    device = plan().device
    start = device.total_bytes_at_start + OTHER_PROCESSES_BYTES
    full = device.total_bytes_at_full_load + OTHER_PROCESSES_BYTES
    fits = {
        size: (plan(size).room.fits_at_start, plan(size).room.fits_at_full_load)
        for size in (start - 1, start, full - 1, full)
    }
    assert fits == {
        start - 1: (False, False),
        start: (True, False),
        full - 1: (True, False),
        full: (True, True),
    }


def test_weights_and_kv_cache_must_fit_into_shared_memory() -> None:
    assert plan(shared_memory_bytes=1160 * MB).room.fits_at_full_load
    room = plan(shared_memory_bytes=1160 * MB - 1).room
    assert (room.fits_at_start, room.fits_at_full_load) == (True, False)
    assert (room.max_num_seqs, room.max_instances) == (3, 1)
    assert room.max_kv_tokens == (160 * MB - 1) // 20_000
    assert plan(shared_memory_bytes=1000 * MB).room.weights_fit
    room = plan(shared_memory_bytes=1000 * MB - 1).room
    assert (room.weights_fit, room.fits_at_start, room.fits_at_full_load) == (False,) * 3
    assert (room.max_instances_at_start, room.max_instances, room.max_num_seqs) == (0, 0, 0)
    assert (room.max_kv_tokens, room.max_model_len) == (0, 0)


@pytest.mark.parametrize("memory_bytes", [1_500 * MB, 1_600 * MB, 2_000 * MB, 5_000 * MB])
def test_the_largest_that_fit_do_and_one_more_does_not(memory_bytes: int) -> None:
    room = plan(memory_bytes).room
    if room.max_instances:
        assert plan(memory_bytes, num_instances=room.max_instances).room.fits_at_full_load
    assert not plan(memory_bytes, num_instances=room.max_instances + 1).room.fits_at_full_load
    if room.max_num_seqs:
        assert plan(memory_bytes, max_num_seqs=room.max_num_seqs).room.fits_at_full_load
    assert not plan(memory_bytes, max_num_seqs=room.max_num_seqs + 1).room.fits_at_full_load
    idle = room.max_instances_at_start
    assert plan(memory_bytes, num_instances=idle).room.fits_at_start
    assert not plan(memory_bytes, num_instances=idle + 1).room.fits_at_start


def test_a_shorter_length_is_proposed_where_the_sequences_do_not_fit() -> None:
    device = plan().device
    missing = 30 * MB  # of 160 MB, so 13/16 of each sequence's 1,024 tokens are left
    room = plan(device.total_bytes_at_full_load + OTHER_PROCESSES_BYTES - missing).room
    assert room.max_kv_tokens == 130 * MB // 20_000
    assert room.max_model_len == 768  # 812 tokens a sequence, of which full blocks count
    assert plan(100_000 * MB).room.max_model_len == 1024


def test_what_is_proposed_fits_where_blocks_are_larger_than_their_tokens() -> None:
    whole = plan(sequence_bytes=80 * MB).device
    left = whole.total_bytes_at_full_load + OTHER_PROCESSES_BYTES - 300 * MB
    room = plan(left, sequence_bytes=80 * MB).room
    assert room.max_model_len == 512  # of 640 MB 340 are left: 42.5 MB each, 544 tokens
    assert room.max_kv_tokens == 340 * MB // 78125


def test_nothing_larger_is_proposed_than_can_be_served() -> None:
    room = plan(1 << 60).room
    assert (room.max_instances_at_start, room.max_instances) == (MAX_INSTANCES, MAX_INSTANCES)
    assert room.max_num_seqs == MAX_NUM_SEQS


def test_the_machine_is_this_one_or_the_one_that_was_given() -> None:
    here = read_machine(None, None)
    assert not here.given
    assert 0 < here.memory_bytes < 1 << 62
    assert read_machine(None, 1000).shared_memory_bytes == 1000
    assert read_machine(5000, None) == Machine(5000, 5000, given=True)
    assert read_machine(5000, 9000).shared_memory_bytes == 5000
    assert read_machine(5000, 1000) == Machine(5000, 1000, given=True)


def test_what_an_allocator_has_for_the_model_is_there_for_it() -> None:
    """The allocator's limit is the one that counts, and what it holds of the model comes on top."""
    held = Held(free_bytes=1000, for_model_bytes=500)
    assert read_machine(None, 10, held).shared_memory_bytes == 1500


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (plan(), ("Fits: ", "up to 55 instances with 4 sequences each")),
        (plan(1_650 * MB), ("Fits at the start, but", "--instances 1 or --max-num-seqs 3")),
        (
            plan(shared_memory_bytes=1_100 * MB),
            ("Fits at the start, but 60.0 MB are missing", "of shared memory 1.10 GB may be"),
        ),
        (plan(1_500 * MB, num_instances=9), ("Does not fit: ", "would fit: 5 idle instances")),
        (plan(1_000 * MB), ("Does not fit: ", "419.2 MB are missing already at the start")),
        (plan(shared_memory_bytes=MB), ("Does not fit: ", "1.0 MB may be used", "--memory-limit")),
        (
            plan(size=2),
            (
                "600.0 MB are split by columns",
                "All 2 ranks on one device",
                "Each rank on one of 2 devices",
            ),
        ),
        (plan(size=2, given=False), ("`--memory BYTES`, of one device",)),
    ],
)
def test_a_person_is_told_what_to_do(made: Plan, words: tuple[str, ...]) -> None:
    text = plan_lines(made)
    assert all(word in text for word in words), text
    assert max(map(text.count, ("Fits", "Does not fit"))) <= (2 if made.rank_room else 1)


def test_a_model_that_embeds_keeps_nothing() -> None:
    roomy = plan(embeds=True)
    assert roomy.device.kv_bytes_at_full_load == 0
    assert (roomy.room.max_kv_tokens, roomy.room.max_model_len) == (0, 1024)
    assert "keeps nothing of them" in plan_lines(roomy)
    narrow = plan(roomy.device.total_bytes_at_full_load + OTHER_PROCESSES_BYTES - 1, embeds=True)
    assert (narrow.room.fits_at_start, narrow.room.fits_at_full_load) == (True, False)
    assert narrow.room.max_model_len == 0
    assert "tokens in all" not in plan_lines(narrow)


def test_slots_are_each_instance_s_own() -> None:
    offload = OffloadEstimate(
        num_layers=24,
        num_offloaded=20,
        slots_bytes=100 * MB,
        pass_bytes=4_000 * MB,
        read_bytes_per_s=2_000 * MB,
        memory_bytes_per_s=20_000 * MB,
    )
    made = plan(offload=offload)
    assert made.device.slots_bytes == 200 * MB
    without = plan().device
    assert made.device.total_bytes_at_start == without.total_bytes_at_start + 200 * MB
    assert made.offload is not None
    assert made.offload.hidden(made.device.weights_bytes) == pytest.approx(0.25 / 2)
    text = plan_lines(made)
    assert "20 of 24 layers are offloaded: a pass reads 4.00 GB" in text
    assert "then 12% of reading can be hidden" in text
    least = made.device.total_bytes_at_full_load + OTHER_PROCESSES_BYTES
    assert plan(least, offload=offload).room.fits_at_full_load
    assert not plan(least - 1, offload=offload).room.fits_at_full_load
    assert not plan(shared_memory_bytes=1_099 * MB, offload=offload).room.weights_fit
