"""The command line: `pasture serve`, `check`, `config`, `bench`, `demo`.

Thin: it turns arguments into a `Configuration`, calls `pasture.server` or `pasture.bench`, and prints. Commands import what
they need when they run, so that `pasture --help` answers at once.
"""
