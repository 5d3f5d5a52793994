"""The claims of the Minitron papers, repeated on small models: suites, arms, verdicts, page. ``benchmarks/claims.py`` is the command."""
