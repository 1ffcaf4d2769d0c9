"""Weight sets: their states, the requests on them, and their images on disk."""
