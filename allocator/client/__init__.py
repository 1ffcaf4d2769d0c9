"""In a client's process: sessions, weights, leased blocks and modules, mapped and kept in order."""
