"""`python -m midwatch`: the `midwatch` command. Started by name, since this package does not import the launcher."""

import runpy

if __name__ == "__main__":
    runpy.run_module("launcher.cli", run_name="__main__", alter_sys=True)
