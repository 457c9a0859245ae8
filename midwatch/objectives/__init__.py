"""What is known of an objective without torch: its spec, the settings that it has, and how a name becomes a spec."""
