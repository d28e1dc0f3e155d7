"""One self-contained page of runs and verdicts: what it shows (gather), the file (write), and a
server (serve)."""
