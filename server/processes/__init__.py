"""Other processes seen from outside: whether they live, how they end, and how to end them."""
