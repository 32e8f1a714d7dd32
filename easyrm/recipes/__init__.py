"""One TOML file for each published run."""
