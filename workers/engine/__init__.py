"""In an instance: who is computed next, and what comes of it."""
