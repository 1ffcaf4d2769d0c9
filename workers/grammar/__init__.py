"""Grammars: whether they can be followed, and which tokens they allow next, found out in cells."""
