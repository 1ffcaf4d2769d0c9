"""Weight sets in a client: mapped, written, moved between tiers, and seen as tensors."""
