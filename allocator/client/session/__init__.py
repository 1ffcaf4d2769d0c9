"""One session with the allocator: requests and replies, and what is done when none comes."""
