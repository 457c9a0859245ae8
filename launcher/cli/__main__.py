"""The `midwatch` command: parses its arguments and hands over to a package, importing only what the command needs."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.cli.parser import make_parser
from shards.common.terminal import run_command, write_error, write_out, write_path

if TYPE_CHECKING:
    from midwatch.transport.ssh_url import RemoteRun


def main() -> int:
    return run_command(_command)


def _command() -> int:
    parser = make_parser()
    arguments = parser.parse_args()
    if arguments.version:
        from importlib.metadata import version

        write_out(f"midwatch {version('midwatch')}")
        return 0
    if arguments.command is None:
        parser.print_help()
        return 2
    return _hand_over(arguments)


def _hand_over(arguments: argparse.Namespace) -> int:
    if arguments.command == "shards":
        return _shards(arguments)
    from launcher.cli.runs import NoSuchRun
    from midwatch.commands import CommandError
    from midwatch.recipe import RecipeError
    from midwatch.transport.discovery import ClientError

    try:
        if arguments.command == "run":
            return _run(arguments)
        if arguments.command == "attach":
            return _attach(arguments)
        if arguments.command == "export":
            from launcher.cli.export import export

            return export(arguments)
        if arguments.command == "probe":
            from launcher.cli.probe import probe

            return probe(arguments)
        if arguments.command == "prefer":
            return _prefer(arguments)
        if arguments.command == "plan":
            from launcher.cli.plan import plan

            return plan(arguments)
        from launcher.cli import control

        if arguments.command in ("stop", "resume", "status"):
            from launcher.cli.queue import ask_queue

            if (status := ask_queue(arguments)) is not None:
                return status
        if "steering" in arguments:
            return control.steer(arguments)
        return control.COMMANDS[arguments.command](arguments)
    except (RecipeError, NoSuchRun, CommandError) as error:
        write_error(f"midwatch: {error}")
        return 2
    except ClientError as error:
        write_error(f"midwatch: {error}")
        return 1
    except UnicodeEncodeError as error:  # of an argument or a directory: messages and files hold UTF-8
        write_error(f"midwatch: {error.object[:200]}: is not UTF-8 (give or rename it as UTF-8)")
        return 2
    except OSError as error:
        place = f"{error.filename}: " if error.filename is not None else ""
        write_error(f"midwatch: {place}{error.strerror or error}")
        return 1


def _shards(arguments: argparse.Namespace) -> int:
    """The shards' own commands; a recipe is read for them."""
    from shards.commands import run

    if arguments.shards_name == "build" and arguments.recipe is not None:
        from launcher.cli.runs import check_recipe, with_data_directory
        from midwatch.recipe import RecipeError

        try:
            recipe = with_data_directory(check_recipe(Path(arguments.recipe)), Path("runs").absolute() / "run")
        except RecipeError as error:
            write_error(f"midwatch: {error}")
            return 2
        assert recipe.data.dir is not None
        arguments.build = recipe.build(recipe.data.dir)
    return run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from launcher.cli.queue import needs_job, submit_run, wait_in_queue
    from launcher.cli.runs import check_recipe, make_run
    from midwatch.recipe import RecipeError, load_recipe, warnings
    from midwatch.signals import EndingSignals

    script = None
    if arguments.script is not None:
        from tui.script import ScriptError, parse_script

        try:
            script = parse_script(arguments.script)
        except ScriptError as error:
            raise RecipeError(f"--script: {error}") from None
    directory = Path(arguments.dir) if arguments.dir else None
    recipe = check_recipe(Path(arguments.recipe))  # once: it may be a pipe
    if not arguments.no_check and recipe.cluster.backend == "ssh":
        from launcher.cli.check import nodes_are_ready

        if not nodes_are_ready(recipe, directory):
            return 2
    asked = arguments.headless or arguments.json or script is not None
    owns = (asked or not _has_terminal()) and not arguments.detach
    signals = EndingSignals() if owns else None  # before there is a run: no signal leaves one without an owner
    paths = make_run(recipe, directory)
    for warning in warnings(load_recipe(paths.recipe)):
        write_error(f"midwatch: warning: {warning}")
    if signals is not None and signals.waiting:
        write_error(f"midwatch: stopped by a signal before the run was started; midwatch resume {paths.root} starts it")
        return 4
    submitted = submit_run(paths) if needs_job(paths) else None
    if arguments.detach and not asked and submitted is not None:
        write_path(paths.root)
        return 0
    if arguments.detach and not asked:
        from midwatch.transport.discovery import start_controller, wait_for_controller

        wait_for_controller(paths, start_controller(paths.root))
        write_path(paths.root)
        return 0
    place: Path | RemoteRun = paths.root
    if submitted is not None:
        if (left := wait_in_queue(submitted, as_json=arguments.json, signals=signals)) is not None:
            return left
        place = submitted
    else:
        _warn_of_logout()
    if asked or not _has_terminal():
        from tui.headless import report

        return report(place, as_json=arguments.json, script=script, signals=signals)
    from tui.app import run

    return run(place)


def _attach(arguments: argparse.Namespace) -> int:
    from launcher.backends.slurm.jobs import SlurmRun
    from launcher.cli.queue import wait_in_queue
    from launcher.cli.runs import find_anywhere, remember

    root = find_anywhere(arguments.run)
    if isinstance(root, SlurmRun):
        remember(root.root)
        if (left := wait_in_queue(root, as_json=arguments.json)) is not None:
            return left
    if isinstance(root, Path):
        remember(root)
    if arguments.headless or arguments.json or not _has_terminal():
        from tui.headless import report

        return report(root, as_json=arguments.json, script=None)
    from tui.app import run

    return run(root, read_only=arguments.read_only)


def _prefer(arguments: argparse.Namespace) -> int:
    from launcher.cli.prefer import begin_of, tell
    from launcher.cli.runs import find_anywhere

    if arguments.export is not None or arguments.agreement:
        return tell(arguments)
    begin = begin_of(arguments)
    if not _has_terminal():
        write_error("midwatch: prefer needs a terminal to show the answers on (--export and --agreement need none)")
        return 2
    from tui.app import run

    return run(find_anywhere(arguments.run), prefer=begin)


def _has_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def _warn_of_logout() -> None:
    """Says so where the system would end the run with the operator's session."""
    from launcher.preflight.logout import kills_at_logout

    if kills_at_logout():
        write_error(
            "midwatch: warning: this system ends a user's processes at logout; to keep the run:\n"
            "  systemd-run --user --scope midwatch run ...   (and, once: loginctl enable-linger)"
        )


if __name__ == "__main__":
    sys.exit(main())
