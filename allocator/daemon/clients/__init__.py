"""Who is connected: lifelines, sessions, the socket of requests, and bounds for those who flood."""
