"""The table and lines of `onecopy verify`."""

from rich.table import Table

from server.machine.device_verify import DeviceVerdict
from server.machine.verify import Verdict
from server.units import size_text


def verdict_text(verdict: Verdict | DeviceVerdict) -> Table:
    """The body of `onecopy verify`."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("INSTANCE", no_wrap=True)
    on_host = isinstance(verdict, Verdict)
    own = ("WEIGHTS MAPPED", "RESIDENT", "SHARE", "PRIVATE", "KV")
    for name in ("PID", *(own if on_host else ("BY THE DRIVER",))):
        table.add_column(name, justify="right", no_wrap=True)
    if isinstance(verdict, DeviceVerdict):
        for instance in verdict.instances:
            seen = instance.driver_bytes
            table.add_row(
                instance.name, str(instance.pid), "-" if seen is None else size_text(seen)
            )
        return table
    for one in verdict.instances:
        table.add_row(
            one.name,
            str(one.pid),
            size_text(one.mapped_bytes),
            size_text(one.resident_bytes),
            size_text(one.weights_pss_bytes),
            size_text(one.private_bytes),
            size_text(one.kv_bytes),
        )
    return table


def verdict_lines(verdict: Verdict | DeviceVerdict) -> str:
    """What the table adds up to."""
    if not verdict.holds:
        problems = [f"  - {problem}" for problem in verdict.problems]
        return "\n".join((_shares(verdict), "One copy: DOES NOT HOLD.", *problems))
    count, num_processes = _count(verdict), len(verdict.instances)
    instances = f"{count} instance{'' if count == 1 else 's'}"
    who = f"The {num_processes} ranks of {instances}" if count < num_processes else instances
    together = f"{who} take {size_text(verdict.total_bytes)}"
    if count > 1:
        together += f"; {count} private copies would take {size_text(verdict.unshared_bytes)}"
    together += "."
    return "\n".join((_shares(verdict), together, "One copy: holds."))


def _count(verdict: Verdict | DeviceVerdict) -> int:
    """Of instances; the ranks of one counted once."""
    return verdict.num_instances if isinstance(verdict, Verdict) else len(verdict.instances)


def _shares(verdict: Verdict | DeviceVerdict) -> str:
    if isinstance(verdict, DeviceVerdict):
        return (
            f"{size_text(verdict.weights_bytes)} of weights on {verdict.device} ({verdict.model}). "
            f"Of {size_text(verdict.used_bytes)} in use there the allocator owns "
            f"{size_text(verdict.allocator_bytes)} and other programs have "
            f"{size_text(verdict.others_bytes)}; {size_text(verdict.clients_bytes)} are the "
            f"{verdict.num_clients} clients' own: contexts, kernels, workspaces."
        )
    whose = "ranks" if verdict.num_instances < len(verdict.instances) else "instances"
    shares = (
        f"{size_text(verdict.weights_bytes)} of weights in {verdict.segment} (inode "
        f"{verdict.inode}); the {whose}' shares of them add up to "
        f"{size_text(verdict.weights_pss_bytes)}."
    )
    if verdict.weights_bytes < verdict.max_private_bytes:
        shares += (
            f" A private copy of so little would not show: an instance may have "
            f"{size_text(verdict.max_private_bytes)} for itself (--max-private)."
        )
    return shares
