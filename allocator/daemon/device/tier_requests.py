"""What the requests that move weight sets between tiers do: to sleep, and that it is done.

Owns their handlers. Invariants: a copy that is to be left is freed only once the journal knows of
the one that replaces it; on a device whose memory is the host's own nothing is copied for the host
tier. Waking is opening a set that sleeps (`set_requests`); the copying itself is a client's.
"""

from collections.abc import Mapping

from allocator.backends.room import size
from allocator.daemon.device.parts import Asked, Parts
from allocator.daemon.weights.weight_set import Waiter
from allocator.errors import OutOfDeviceMemory, UnknownWeightSet
from allocator.messages import Done, Handle, Moved, Moving, Sleep


class TierRequests:
    """Of one device."""

    def __init__(self, parts: Parts, host_tier_limit: int | None) -> None:
        """`host_tier_limit`: bytes that may sleep in host memory; None is as many as there are."""
        self._parts = parts
        self._sets = parts.memory.sets
        self._host_tier_limit = host_tier_limit

    def sleep(self, asked: Asked, request: Sleep) -> Done | Moving | None:
        """Down at once, or to be copied by who asks; or wait for who copies."""
        sets, key, tier = self._sets, request.key, request.tier
        step, effects = sets.sleep(key, tier)
        if step == "wait":
            deadline = asked.now + request.wait_ms / 1000
            sets.wait(key, Waiter(asked.number, asked.reply_to, deadline, request))
            return None
        if step == "asleep":
            self._parts.notes.set(key)
            self._parts.apply(effects)
            return Done()
        if tier == "host" and self._parts.segments.shares_host_memory:
            self._check_host_tier(sets.num_bytes_of(key))
            sets.relabel(key, "host")
            self._parts.notes.set(key)
            self._parts.history.add("asleep", f"{key}, on the host tier")
            return Done()
        weight_set = sets.get(key)
        if weight_set is None or weight_set.highest is None:
            raise UnknownWeightSet(f"no weight set is called {key!r}")
        target = None
        if tier == "host":
            target = self._target(weight_set.highest.handle.num_bytes)
        moving = sets.move(asked.number, key, tier, target, str(self._parts.images.path))
        self._parts.notes.set(key)
        return moving

    def moved(self, asked: Asked, request: Moved) -> Done:
        """The copy below is complete, and the one above is given up."""
        parts, sets, key = self._parts, self._sets, request.key
        weight_set = sets.writing(asked.number, key, request.generation)
        image = None
        if weight_set.target_tier == "disk":
            image = parts.images.written(key, weight_set.fingerprint)
        elif weight_set.target_tier == "host" and weight_set.target is not None:
            parts.host_tier.seal(weight_set.target.segment)
        effects = sets.moved(asked.number, key, request.generation, image)
        parts.notes.set(key)
        parts.apply(effects)
        parts.history.add("asleep", f"{key}, on the {weight_set.tier} tier")
        return Done()

    # --- steps

    def _target(self, num_bytes: int) -> Handle:
        """A segment of the host tier. Raises OutOfDeviceMemory."""
        self._check_host_tier(num_bytes)
        host_tier = self._parts.host_tier
        outstanding = self._parts.room.outstanding_bytes(host_tier)

        def reserve(handle: Handle) -> None:
            host_tier.reserve(handle.segment, num_bytes, outstanding_bytes=outstanding)

        return self._parts.segments.made(host_tier, num_bytes, reserve)

    def _check_host_tier(self, num_bytes: int) -> None:
        used, limit = self._sets.num_bytes("host"), self._host_tier_limit
        if limit is not None and used + num_bytes > limit:
            raise OutOfDeviceMemory(
                f"{size(num_bytes)} are to sleep in host memory, but the host tier may hold "
                f"{size(limit)} and holds {size(used)}: sleep to disk (level 2), or "
                "raise --host-tier-limit."
            )


def found_image(parts: Parts, key: str, fingerprint: Mapping[str, str]) -> None:
    """Whoever wrote an image of the set may have come to its end between the last byte and its
    word."""
    image = parts.images.find(key, fingerprint)
    if image is not None:
        parts.memory.sets.found_image(key, image)
