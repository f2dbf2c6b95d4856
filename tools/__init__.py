"""Commands that use a trained chain, run as `python -m tools.NAME`; the packages hold what they are made of."""
