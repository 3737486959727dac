"""The norm of gradients that are spread over ranks.

``placements`` reads from DTensors which rank holds what, ``topology`` finds the process groups that
add up a mesh, ``reduce`` adds up over them, ``partial`` measures gradients that are pending sums.
"""
