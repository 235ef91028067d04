"""What several test modules need. On `sys.path` by `pythonpath` in pyproject.toml."""
