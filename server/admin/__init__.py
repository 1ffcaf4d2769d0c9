"""Who runs, in what state, and how many there should be: over a socket or a scrape."""
