"""What outlives the daemon: a file of records, and their adoption by the next one."""
