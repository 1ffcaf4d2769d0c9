"""What this machine has and what onecopy takes of it: looked at, judged and proven."""
