"""One request on its way: all that the schedule, the sampler and the cache know of it.

Owns what is noted of a sequence, each thing once: how many of its tokens are computed is what its
cache holds, how many were generated is what lies behind its prompt. Invariant: a sequence has a
cache exactly as long as it runs. Does not know when it is computed, or by whom.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

from workers.kv.cache import SequenceCache
from workers.kv.table import BlockTable
from workers.messages import FinishReason, SamplingParams
from workers.sampling import SequenceSampler


@dataclass(slots=True, eq=False)
class GenerationSequence:
    """Its tokens are its sampler's."""

    request_id: str
    sampler: SequenceSampler
    """Its tokens, and what the choice of the next depends on."""
    cache: SequenceCache | None = None
    """The keys and values of the tokens computed, while it runs."""

    # What it came with.
    priority: int = 0
    """The lower goes first."""
    cache_salt: str = ""
    """Only sequences of the same salt share what was computed."""
    most_per_step: int | None = None
    """The most tokens of it that one step may compute, where something limits that."""
    may_skip: bool = True
    """Whether tokens whose keys and values are known need not be computed again."""
    since_ms: int = 0
    """When it came (CLOCK_MONOTONIC); 0 where it does not matter."""
    added_at: float = 0.0
    """The same by the engine's clock."""
    expires_at: float | None = None
    """When it ends by itself, by the engine's clock."""
    arrival: int = field(init=False, default=-1)
    """Its number among all that came, given by the scheduler."""

    # How far it is.
    num_known: int = field(init=False)
    """Tokens that it had when it last began: they are computed in chunks, later ones as they come.
    """
    num_reached: int = 0
    """The most of its tokens that were ever computed at once."""
    draft: tuple[int, ...] = ()
    """Tokens that may come next, to be computed along with the last one on trial."""
    is_held: bool = False
    """Something else has to come first, such as what its grammar allows: no step computes it."""
    stalled_since: float | None = None
    """When there was no room for it, nobody else ran, and it has not come further since."""

    # What somebody was told.
    num_cached: int | None = None
    """Tokens of the prompt that were found, until somebody was told."""
    num_told: int = 1
    """Tokens of the prompt, from the first on, whose log probabilities need not be told any more.
    """

    def __post_init__(self) -> None:
        self.num_known = len(self.token_ids)

    @property
    def sampling(self) -> SamplingParams:
        """What the request says of the choice of tokens, and of the end."""
        return self.sampler.params

    @property
    def token_ids(self) -> list[int]:
        """All its tokens."""
        return self.sampler.tokens.ids

    @property
    def num_prompt(self) -> int:
        """Tokens that it came with, but for those generated before."""
        return self.sampler.tokens.num_prompt

    @property
    def num_generated(self) -> int:
        """Tokens that were generated, here or by an earlier instance."""
        return self.sampler.tokens.num_generated

    @property
    def held(self) -> SequenceCache:
        """Its cache. Only while it runs."""
        if self.cache is None:
            raise RuntimeError(f"request {self.request_id!r} does not run")
        return self.cache

    @property
    def table(self) -> BlockTable:
        """Where its keys and values lie. Only while it runs."""
        return self.held.table

    @property
    def num_computed(self) -> int:
        """Tokens whose keys and values are in its cache."""
        return 0 if self.cache is None else self.cache.table.num_tokens

    @property
    def num_pending(self) -> int:
        """Tokens still to be computed before the next can be sampled. At least 1 while alive."""
        return len(self.token_ids) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """All that it began with is computed: it now needs one token a step."""
        return self.num_computed >= self.num_known

    def begin_anew(self) -> None:
        """It has given way: what it knows by now is to be computed in chunks again."""
        self.num_known = len(self.token_ids)
        self.draft = ()

    def finish_reason(
        self, eos_token_ids: Collection[int], max_model_len: int
    ) -> FinishReason | None:
        """Whether the last generated token was the last one."""
        sampling = self.sampling
        token = self.token_ids[-1]
        if token in sampling.stop_token_ids and self.num_generated > sampling.min_tokens:
            return "stop"
        if token in eos_token_ids and not sampling.ignore_eos:
            return "stop"
        if self.sampler.finished:
            return "stop"
        if self.num_generated >= sampling.max_tokens:
            return "length"
        if len(self.token_ids) >= max_model_len:
            return "length"
        return None
