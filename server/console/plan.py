"""The table and lines of `onecopy plan`."""

from rich.table import Table

from server.machine.plan import DevicePlan, Load, Plan, Room
from server.machine.proposal import Proposal
from server.settings import MAX_INSTANCES
from server.units import size_text


def plan_heading(plan: Plan) -> str:
    """What stands above the table of `onecopy plan`."""
    load = plan.load
    ranks = f" of {load.num_ranks} ranks" if load.num_ranks > 1 else ""
    return (
        f"{plan.model}: {plan.architecture}, {plan.num_parameters / 1e6:,.1f} million parameters "
        f"in {plan.dtype}\n{_count(load.num_instances, 'instance')}{ranks}, each with up to "
        f"{_count(load.max_num_seqs, 'sequence')} of up to {load.max_model_len:,} tokens\n"
    )


def plan_table(plan: Plan) -> Table:
    """The body of `onecopy plan`: what each device holds, idle and at most."""
    devices = [("", plan.device)]
    if plan.rank_device is not None:
        size = plan.load.tensor_parallel_size
        devices = [("ONE DEVICE,\n", plan.device), (f"EACH OF {size},\n", plan.rank_device)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for name, _ in devices:
        for moment in ("AT THE START", "AT FULL LOAD"):
            table.add_column(f"{name}{moment}", justify="right", no_wrap=True)
    sequences = _count(plan.load.num_instances * plan.load.max_num_seqs, "sequence")
    pairs: dict[str, list[tuple[int, int]]] = {
        "weights, held once": [(one.weights_bytes,) * 2 for _, one in devices],
        "slots for offloaded layers": [(one.slots_bytes,) * 2 for _, one in devices],
        "sums of ranks": [(one.sums_bytes,) * 2 for _, one in devices],
        f"KV cache, {sequences}": [(0, one.kv_bytes_at_full_load) for _, one in devices],
        "private memory, about": [
            (one.private_bytes_at_start, one.private_bytes_at_full_load) for _, one in devices
        ],
        "together": [
            (one.total_bytes_at_start, one.total_bytes_at_full_load) for _, one in devices
        ],
    }
    for label, sizes in pairs.items():
        if label.startswith(("slots", "sums")) and not any(sum(pair) for pair in sizes):
            continue
        cells = [size_text(size) for pair in sizes for size in pair]
        table.add_row(label, *cells, style="bold" if label == "together" else "")
    return table


def plan_lines(plan: Plan) -> str:
    """What the table means, and whether it fits."""
    device, load, size = plan.device, plan.load, plan.load.num_ranks
    cache = (
        f"A token takes {device.kv_bytes_per_token:,} bytes of KV cache, a sequence of "
        f"{load.max_model_len:,} tokens {size_text(device.kv_bytes_per_sequence)}. At full load "
        "every sequence is at its full length."
    )
    if not device.kv_bytes_per_token:
        cache = "It embeds texts, and keeps nothing of them between its steps."
    lines = ["", cache, *_offload_lines(plan)]
    if plan.split is None:
        if size > 1:
            lines.append(
                f"All {size} ranks of an instance are on one device, and view the one copy."
            )
        return "\n".join(lines + _room_lines(load, device, plan.room))
    lines += [
        f"Of the weights {size_text(plan.split.column_bytes)} are split by columns and "
        f"{size_text(plan.split.row_bytes)} by rows, 1/{size} for each rank; each has all of the "
        f"other {size_text(plan.split.replicated_bytes)} (embeddings, norms, output head).",
        "",
        f"All {size} ranks on one device, where they view the one copy:",
        *_room_lines(load, device, plan.room),
        "",
        f"Each rank on one of {size} devices:",
    ]
    if plan.rank_device is not None and plan.rank_room is not None:
        lines += _room_lines(load, plan.rank_device, plan.rank_room)
    else:
        lines.append("`--memory BYTES`, of one device, compares with what you have.")
    return "\n".join(lines)


def proposal_lines(proposal: Proposal) -> str:
    """Where the layers should be, and why."""
    placement, plan = proposal.placement, proposal.plan
    lines = ["", f"Placement: {placement.reasons[0]}", *placement.reasons[1:]]
    if plan is not proposal.asked:
        lines += _offload_lines(plan)
        lines.append(
            f"`onecopy serve` does so with `--placement auto`, or `{' '.join(placement.options)}`."
        )
    return "\n".join(lines)


def _offload_lines(plan: Plan) -> list[str]:
    """Which layers go, and what that costs."""
    offload, weights = plan.offload, plan.device.weights_bytes
    if offload is None:
        return []
    lines = [
        f"{offload.num_offloaded} of {offload.num_layers} layers are offloaded: a pass reads "
        f"{size_text(offload.pass_bytes)} of them."
    ]
    if offload.read_s:
        speed = f"{size_text(offload.read_bytes_per_s)}/s, as measured here"
        compute = offload.compute_s(weights)
        lines.append(
            f"Reading takes {offload.read_s:.2g} s of each pass ({speed}). One token computes for "
            f"{compute:.2g} s if the weights come as fast as this memory gives them: then "
            f"{offload.hidden(weights):.0%} of reading can be hidden behind it, and more where a "
            "pass computes for longer: several requests at once, or a prompt."
        )
    return lines


def _room_lines(load: Load, device: DevicePlan, room: Room) -> list[str]:
    """Whether it fits, and what would."""
    if device.weights_bytes > room.shared_memory_bytes:
        return [
            f"Does not fit: the weights need {size_text(device.weights_bytes)} of shared memory, "
            f"{size_text(room.shared_memory_bytes)} may be used. Raise --memory-limit or --memory "
            "where you gave it, else enlarge /dev/shm (`onecopy doctor` says how). Or leave "
            "layers on disk: `--device-memory BYTES` says what the weights may take."
        ]
    left = room.memory_bytes - room.other_processes_bytes
    there = (
        f"of {size_text(room.memory_bytes)} {'given' if room.given else 'available here'}, server, "
        f"allocator and forkserver take about {size_text(room.other_processes_bytes)}"
    )
    each, instances = _count(load.max_num_seqs, "sequence"), _count(load.num_instances, "instance")
    if room.fits_at_full_load:
        spare = size_text(left - device.total_bytes_at_full_load)
        return [
            f"Fits: {spare} are left at full load ({there}).",
            f"At full load up to {_count(room.max_instances, 'instance')} with {each} each would "
            f"fit, or {instances} with {_count(room.max_num_seqs, 'sequence')} each, "
            f"or {_idle(room)}.",
        ]
    if not room.fits_at_start:
        lines = [
            f"Does not fit: {size_text(device.total_bytes_at_start - left)} are missing already at "
            f"the start ({there})."
        ]
        if room.max_instances_at_start:
            lines.append(f"What would fit: {_idle(room)}.")
        return lines
    options = {
        "--instances": room.max_instances,
        "--max-num-seqs": room.max_num_seqs,
        "--max-model-len": room.max_model_len,
    }
    fitting = " or ".join(f"{option} {number}" for option, number in options.items() if number)
    fitting += ", else as planned; " if fitting else ""
    tokens = f"{room.max_kv_tokens:,} tokens in all of {instances}; " * bool(room.max_kv_tokens)
    missing = device.total_bytes_at_full_load - left
    shared = device.weights_bytes + device.kv_bytes_at_full_load - room.shared_memory_bytes
    if shared > missing:
        missing, there = (
            shared,
            f"of shared memory {size_text(room.shared_memory_bytes)} may be used",
        )
    return [
        f"Fits at the start, but {size_text(missing)} are missing at full load ({there}).",
        f"What would fit: {fitting}{tokens}or {_idle(room)}.",
    ]


def _idle(room: Room) -> str:
    """How many instances fit as long as nobody asks them anything."""
    most = " (serve's limit)" if room.max_instances_at_start == MAX_INSTANCES else ""
    return f"{_count(room.max_instances_at_start, 'idle instance')}{most}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
