"""In the daemon: who holds which bytes of which device, and what becomes of them."""


def main() -> int:
    """`python -m allocator`. Imports what only a daemon needs: clients import this folder, too, for
    its settings."""
    from allocator.daemon.command import main as command

    return command()
