"""The `dra` command: parse, call one function, print."""
