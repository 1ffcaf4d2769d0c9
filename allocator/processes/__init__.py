"""What the kernel says of processes, and how our own modules become some."""
