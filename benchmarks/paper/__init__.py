"""The paper's six tables and four figures, from real data: `nox -s paper -- --help`."""
