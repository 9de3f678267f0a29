"""One module per sub-command of `efrdn`; none imports torch before its `run` is called."""
