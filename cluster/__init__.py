"""Where and on what a job runs: sessions, checks before the start, dry runs, submission. Only the CLI imports it."""
