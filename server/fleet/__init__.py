"""The instances of a model and the allocator beside them, and the requests on their way there."""
