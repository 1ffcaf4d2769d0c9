"""What a person sees in the terminal, by subject: wording and layout, and nothing else.

Invariant: what is meant for programs (`--json`) never passes through here.
"""

from server.console.terminal import ConsoleHandler, err, out

__all__ = ["ConsoleHandler", "err", "out"]
