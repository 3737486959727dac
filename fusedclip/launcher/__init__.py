"""``fusedclip run``: the command, the hook at the start of a process, the report at its end."""
