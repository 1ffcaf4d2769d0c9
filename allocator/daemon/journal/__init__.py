"""What is written down: records, for the next daemon to adopt, and events, for people."""
