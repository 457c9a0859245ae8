"""Charts, sparklines and progress strips in braille, dot for dot what the whole series would draw."""
