"""In the daemon: who holds which bytes of which device, and what becomes of them."""
