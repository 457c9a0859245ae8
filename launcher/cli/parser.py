"""The arguments of `midwatch`. Imports nothing heavy: `midwatch --help` answers at once."""

from __future__ import annotations

import argparse
from typing import Any

from midwatch.commands import BY_NAME, add_arguments
from shards.commands import add_commands as add_shards_commands
from shards.common.terminal import Parser

EPILOG = """exit status: 0 done or finished; 1 failed or refused; 2 the recipe or the arguments are wrong;
3 a watch rule stopped the run; 4 an operator or a signal stopped it (it can be resumed)

RUN is a run directory, the name of a run that `midwatch ps` lists, or ssh://[USER@]HOST[:PORT]/NAME for a run on another
machine (ssh://HOST//DIRECTORY names its directory)."""


def make_parser() -> argparse.ArgumentParser:
    """The whole parser, for the command and for shell completion."""
    parser = Parser(
        prog="midwatch",
        description="A terminal for standing watch over LLM training runs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="show the version and leave")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_running(commands)
    _add_planning(commands)
    _add_looking(commands)
    _add_probe(commands)
    _add_prefer(commands)
    _add_export(commands)
    _add_steering(commands)
    shards = commands.add_parser("shards", help="build and look at token shards")
    add_shards_commands(shards.add_subparsers(dest="shards_name", required=True, metavar="COMMAND"))
    completion = commands.add_parser("completion", help="print a completion script for the shell")
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    return parser


def _add_running(commands: Any) -> None:
    run = commands.add_parser("run", help="start a run of a recipe and watch it")
    run.add_argument("recipe", help="the recipe, a TOML file")
    run.add_argument("--dir", metavar="RUN", help="run directory to make (default: runs/NAME)")
    run.add_argument("--headless", action="store_true", help="no screen: one line per report interval; ends when the run does")
    run.add_argument("--json", action="store_true", help="headless: one JSON object a line")
    run.add_argument(
        "--script", metavar="TEXT", help='headless: commands by step, as "20: checkpoint, golden; 40: rollback golden --skip 5"'
    )
    run.add_argument("--detach", action="store_true", help="start the run and leave; with --headless, do not stop it on a signal")
    run.add_argument("--no-check", action="store_true", help="start without checking the nodes first")
    attach = commands.add_parser("attach", help="watch a run, starting its controller where none lives")
    attach.add_argument("run", metavar="RUN", nargs="?", help="default: the newest run")
    attach.add_argument("--read-only", action="store_true", help="watch without the keys that change the run")
    attach.add_argument("--headless", action="store_true", help="no screen: one line per report interval")
    attach.add_argument("--json", action="store_true", help="headless: one JSON object a line")
    agent = commands.add_parser("agent", help="make this machine a node of a run whose nodes join by themselves")
    agent.add_argument("--join", required=True, metavar="URL", help="wss://HOST:PORT of the run's controller ([cluster] port)")
    agent.add_argument("--key-file", required=True, metavar="FILE", help="made by: midwatch node key RUN [NODE] > FILE")
    agent.add_argument("--node", metavar="NAME", help="this node's name in the run (default: its host name)")
    agent.add_argument("--run", metavar="DIR", help="the run's directory here (default: where it was when the key was made)")
    relay = commands.add_parser("relay", help="connect a client at the other end of ssh to a run here; ssh://HOST/RUN uses it")
    relay.add_argument("run", metavar="RUN")
    relay.add_argument("--look", action="store_true", help="start no controller: if none is running, show the run from its files")
    relay.add_argument("--look-when-over", action="store_true", help="the same for a run that has ended or was stopped")
    check = commands.add_parser("check", help="check a recipe, and the nodes that it names, without starting anything")
    check.add_argument("recipe")
    check.add_argument("--dir", metavar="RUN", help="run directory that would be made: its storage is checked (default: runs/NAME)")
    check.add_argument("--json", action="store_true", help="everything, as one JSON object")


def _add_planning(commands: Any) -> None:
    plan = commands.add_parser("plan", help="what a recipe needs, or what a budget allows: size, memory, time, cost")
    plan.add_argument("recipe", nargs="?", help="the recipe; without one, the plan of a budget")
    plan.add_argument("--json", action="store_true", help="the same figures as one JSON object")
    plan.add_argument("--gpu", metavar="NAME", help="accelerator, as h200, h100-sxm, a100-80gb, cpu; an unknown name lists them")
    plan.add_argument("--gpus", type=int, metavar="N", help="how many (default: the recipe's ranks)")
    plan.add_argument("--mfu", type=float, default=0.4, metavar="X", help="model FLOPs utilisation (default: 0.4)")
    plan.add_argument("--price", type=float, metavar="USD", help="of one GPU for an hour (default: a rough one)")
    plan.add_argument(
        "--precision", choices=("float32", "bfloat16", "fp8"), help="of the peak rate (default: the recipe's dtype, or bfloat16)"
    )
    recipes = plan.add_argument_group("with a recipe")
    recipes.add_argument("--pipeline", type=int, metavar="P", help="pipeline ranks (default: the recipe's)")
    recipes.add_argument("--micro-batches", type=int, metavar="M", help="of a step (default: from the recipe's batches)")
    recipes.add_argument("--virtual", type=int, metavar="V", help="interleaved: parts of the model on each pipeline stage")
    budgets = plan.add_argument_group("without a recipe, one or two of")
    budgets.add_argument("--days", type=float, metavar="D", help="time on the GPUs")
    budgets.add_argument("--params", type=_count, metavar="SIZE", help="of the model, as 350M, 7B or 1.5T")
    budgets.add_argument("--tokens", type=_count, metavar="SIZE", help="to train on, as 2T")


def _count(text: str) -> float:
    from launcher.plan.units import parse_count

    try:
        return parse_count(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_probe(commands: Any) -> None:
    probe = commands.add_parser("probe", help="talk to a checkpoint, or to two side by side")
    probe.add_argument("run", metavar="RUN")
    probe.add_argument("--checkpoint", metavar="ID", default="newest", help="its id, a step, golden or newest (default: newest)")
    probe.add_argument("--against", metavar="ID", help="a second one that answers the same")
    probe.add_argument("--prompt", metavar="TEXT", help="answer this and leave (default: standard input, or a conversation)")
    forms = probe.add_mutually_exclusive_group()
    forms.add_argument("--text", action="store_true", help="continue the prompt as it is (default for pretraining checkpoints)")
    forms.add_argument("--chat", action="store_true", help="put it through the chat template (default for all others)")
    probe.add_argument("--limit", type=int, default=256, metavar="N", help="most tokens of an answer (default: 256)")
    probe.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0: always the likeliest token (default: 0.8)")
    probe.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="sample only from the most likely tokens with this total probability"
    )
    probe.add_argument("--top-k", type=int, default=0, metavar="K", help="sample only from the K most likely tokens")
    probe.add_argument("--seed", type=int, default=0, help="the same seed gives the same answer (default: 0)")
    probe.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the answer once it contains this; repeatable"
    )
    probe.add_argument(
        "--alternatives", type=int, default=10, metavar="N", help="with --json: likeliest tokens beside each (default: 10)"
    )
    probe.add_argument("--json", action="store_true", help="one JSON object a token, and one at the end")


def _add_prefer(commands: Any) -> None:
    prefer = commands.add_parser("prefer", help="say which of two answers is better, for reward and dpo to learn from")
    prefer.add_argument("run", metavar="RUN")
    prefer.add_argument("--as", dest="annotator", metavar="NAME", help="who decides (default: your user name)")
    prompts = prefer.add_mutually_exclusive_group()
    prompts.add_argument(
        "--source", metavar="NAME", help="whose prompts are answered (default: those of the newest stage's mixture)"
    )
    prompts.add_argument("--prompts", metavar="FILE", help="prompts instead: one a line, or JSON objects with prompt or messages")
    prefer.add_argument(
        "--checkpoint", metavar="ID", help="checkpoint that answers twice: its id, a step, golden or newest (default: newest)"
    )
    prefer.add_argument("--against", metavar="ID", help="a second checkpoint; each then answers once")
    prefer.add_argument(
        "--shared", type=float, default=0.2, metavar="X", help="share of pairs that all annotators get (default: 0.2)"
    )
    prefer.add_argument("--limit", type=int, default=256, metavar="N", help="most tokens of an answer (default: 256)")
    prefer.add_argument(
        "--temperature", type=float, default=0.8, metavar="X", help="sampling temperature of the answers (default: 0.8)"
    )
    told = prefer.add_mutually_exclusive_group()
    told.add_argument("--export", metavar="FILE", help="no screen: write the pairs (prompt, chosen, rejected) of all annotators")
    told.add_argument("--agreement", action="store_true", help="no screen: how far annotators and the reward model agree")
    prefer.add_argument("--json", action="store_true", help="with --agreement: as one JSON object")


def _add_export(commands: Any) -> None:
    export = commands.add_parser("export", help="write a checkpoint as a Hugging Face directory")
    export.add_argument("run", metavar="RUN")
    export.add_argument("--checkpoint", metavar="ID", default="latest", help="its id, a step, or golden (default: the newest)")
    export.add_argument("--to", metavar="DIR", required=True, help="directory to make")
    export.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (default: as trained)")
    export.add_argument("--untied", action="store_true", help="write a tied output layer as a tensor of its own")


def _add_looking(commands: Any) -> None:
    ps = commands.add_parser("ps", help="list the runs of this machine")
    ps.add_argument("--json", action="store_true")
    status = commands.add_parser("status", help="the state of a run")
    status.add_argument("run", metavar="RUN", nargs="?")
    status.add_argument("--json", action="store_true", help="everything, as one JSON object")
    logs = commands.add_parser("logs", help="logs of ranks, agents and the controller")
    logs.add_argument("run", metavar="RUN", nargs="?")
    logs.add_argument("--file", help="one log, as listed by --list (default: all)")
    logs.add_argument("--list", action="store_true", help="name the logs")
    logs.add_argument("-n", "--lines", type=int, default=50)
    logs.add_argument("-f", "--follow", action="store_true")
    logs.add_argument("--grep", metavar="PATTERN", default="", help="only lines that match the regular expression")
    journal = commands.add_parser("journal", help="who did what, when, and what came of it")
    journal.add_argument("run", metavar="RUN", nargs="?")
    journal.add_argument("--json", action="store_true")
    samples = commands.add_parser("samples", help="what the model writes, with reward and KL")
    samples.add_argument("run", metavar="RUN")
    samples.add_argument("--stage", metavar="STAGE", default="", help="of this stage alone")
    samples.add_argument(
        "--sort",
        choices=("step", "reward", "worst", "kl", "longest"),
        default="step",
        help="newest first (step, the default), best (reward), worst, furthest from the reference (kl), longest",
    )
    samples.add_argument("-n", "--limit", type=int, default=20, metavar="N")
    samples.add_argument("--grep", metavar="PATTERN", default="", help="only those whose prompt or text matches")
    samples.add_argument("--json", action="store_true", help="one JSON object a line")
    metrics = commands.add_parser("metrics", help="print a metric's rows")
    metrics.add_argument("run", metavar="RUN")
    metrics.add_argument("names", nargs="*", metavar="METRIC", help="none: list the metrics")
    metrics.add_argument("-n", "--last", type=int, default=20)
    metrics.add_argument("--json", action="store_true")


def _add_steering(commands: Any) -> None:
    """The commands that steer a run: each as its spec says, with the run before its arguments."""
    nodes = commands.add_parser("node", help="list nodes, take them out of use or put them back")
    groups = {"node": nodes.add_subparsers(dest="node_command", required=True, metavar="COMMAND")}
    listed = groups["node"].add_parser("list", help="every node with its ranks and state")
    listed.add_argument("run", metavar="RUN", nargs="?")
    listed.add_argument("--json", action="store_true")
    key = groups["node"].add_parser("key", help="make a key file for a node that joins by itself, on standard output")
    key.add_argument("run", metavar="RUN")
    key.add_argument("node", metavar="NODE", nargs="?", help="default: one key for all nodes")
    for name, specs in BY_NAME.items():
        first, _, second = name.partition(" ")
        parser = (groups[first] if second else commands).add_parser(second or first, help=specs[0].help)
        parser.set_defaults(steering=name)
        parser.add_argument("run", metavar="RUN")
        parser.add_argument("--json", action="store_true", help="the outcome as a JSON object")
        parser.add_argument("--no-wait", action="store_true", help="leave when the command is accepted")
        add_arguments(parser, name)
