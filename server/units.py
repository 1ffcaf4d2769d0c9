"""Figures as people write them."""


def size_text(num_bytes: float) -> str:
    """A size."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def duration_text(milliseconds: float) -> str:
    """A time."""
    return f"{milliseconds / 1000:.2f} s" if milliseconds >= 1000 else f"{milliseconds:.0f} ms"
