"""How well models predict a text, without a server and an allocator."""
