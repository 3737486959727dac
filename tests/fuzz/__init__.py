"""Attacks on the whole API by random sequences of calls: ``python -m tests.fuzz --seconds 600``.

``memory`` holds gradients in memory of which every byte is known, ``model`` says in fp64 what each
call must do, ``machine`` is the hypothesis state machine that makes the calls.
"""
