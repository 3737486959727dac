"""Made-up results for the tests of what the benchmark writes."""

ENVIRONMENT = {
    "device": "A CPU", "threads": 2, "torch": "2.13.0", "fusedclip": "0.1.0", "backend": "cpu",
    "python": "3.11.7", "date": "2026-01-01", "load": 0.5,
}  # fmt: skip
