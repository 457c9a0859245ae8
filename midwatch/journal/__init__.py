"""The journal, the truth about a run, and the state that it adds up to."""
