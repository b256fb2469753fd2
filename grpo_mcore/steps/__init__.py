"""What a run does, an idea a file: sampling, scoring, updates, engines that follow, the loop around
them. What steps need is handed in; no trainer is imported here."""
