"""Side by side with torch: ``python -m bench`` or ``fusedclip bench``.

``workloads`` are the lists of gradients, ``measure`` takes the times, ``report`` shows them.
"""
