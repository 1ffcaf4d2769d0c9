"""The decoder compiled for another instruction set, run by an emulator."""
