"""The command-line agent: `iv3` and its commands."""
