"""Commands that use a trained chain, run as `python -m tools.NAME`; the packages hold their parts."""
