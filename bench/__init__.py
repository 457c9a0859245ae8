"""Figures, as ratios against a peer or a limit in one run; see `python -m bench`."""
