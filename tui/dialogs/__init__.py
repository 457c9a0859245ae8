"""Questions asked before something is lost."""
