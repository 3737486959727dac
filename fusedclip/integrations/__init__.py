"""fusedclip inside frameworks that clip with functions of their own."""
