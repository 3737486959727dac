"""fusedclip in the frameworks people use, each trained for real: ``make test-integrations``."""
