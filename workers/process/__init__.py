"""Processes: the forkserver, the instances that it forks, and the server's hold on them."""
