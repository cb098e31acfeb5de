"""The command line: one module per command, each an option dataclass with `run`; --help imports nothing heavy."""
