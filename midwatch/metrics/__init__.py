"""Series as they are sent to screens: M4 aggregates."""
