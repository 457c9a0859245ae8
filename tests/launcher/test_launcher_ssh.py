"""Commands over a real ssh to real sshds, and what is said when they do not get there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from midwatch.recipe import Cluster
from midwatch.transport.ssh import MOST_OUTPUT, Result, Ssh, SshError, Why, explain, remote_command
from tests.system.hosts import Hosts, require


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    require()
    with Hosts(("a", "b"), tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture
def ssh(hosts: Hosts) -> Ssh:
    return Ssh(hosts.options)


def clients() -> list[str]:
    return [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True) if child.name() == "ssh"]


async def failure(ssh: Ssh, host: str, command: str = "true", timeout: float = 10) -> SshError:
    with pytest.raises(SshError) as caught:
        await ssh.run(host, command, timeout=timeout)
    return caught.value


async def test_a_command_gets_its_input_and_its_end_and_both_outputs_come_back(ssh: Ssh) -> None:
    results = await asyncio.gather(*(ssh.run(host, "cat; hostname; echo oops >&2; exit 3", b"told\n") for host in ("a", "b")))
    assert [(r.status, r.stdout) for r in results] == [(3, "told\na\n"), (3, "told\nb\n")]
    assert all(r.last_words == "oops" for r in results)


async def test_a_flood_of_output_is_kept_up_to_a_bound(ssh: Ssh) -> None:
    result = await ssh.run("a", "head -c 5000000 /dev/zero; echo end >&2")
    assert (len(result.stdout), result.stderr.splitlines()[-1]) == (MOST_OUTPUT, "end")


async def test_what_a_command_leaves_running_does_not_hold_it_back(ssh: Ssh) -> None:
    began = time.monotonic()
    result = await ssh.run("a", "nohup sleep 20 </dev/null >/dev/null 2>&1 & echo started")
    assert (result.stdout, time.monotonic() - began < 10) == ("started\n", True)


async def test_what_takes_too_long_is_killed_and_so_is_what_is_cancelled(ssh: Ssh) -> None:
    error = await failure(ssh, "a", "echo waiting for godot >&2; sleep 60", timeout=1.5)
    assert (error.why, error.out_of_reach) == ("timeout", True)
    assert "waiting for godot" in str(error)
    task = asyncio.create_task(ssh.run("a", "sleep 60"))
    await asyncio.sleep(0.2)
    assert len(clients()) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert clients() == []


async def test_each_way_of_not_getting_there_is_told_apart(hosts: Hosts, tmp_path: Path) -> None:
    ssh = Ssh(hosts.options, connect_seconds=1)
    other = tmp_path / "known_hosts"
    other.write_text(f"{hosts.address('a')} {(hosts.directory / 'b' / 'host_key.pub').read_text()}")
    unknown = ("-o", "StrictHostKeyChecking=yes", "-o", "UserKnownHostsFile=/dev/null", *hosts.options)
    changed = ("-o", f"UserKnownHostsFile={other}", *hosts.options)
    hosts.cut("b")
    try:
        found = await asyncio.gather(
            failure(ssh, "no-such-host.invalid"),
            failure(Ssh(("-p", "1", *hosts.options)), "a"),
            failure(ssh, "b"),
            failure(Ssh(("-o", "PubkeyAuthentication=no", *hosts.options)), "a"),
            failure(Ssh(unknown), "a"),
            failure(Ssh(changed), "a"),
            failure(Ssh(("-F", "/no/such/file")), "a"),
            failure(ssh, "a", "exec /opt/none/bin/python -m launcher.preflight.node_report"),
        )
    finally:
        hosts.mend("b")
    kinds = [error.why for error in found]
    assert kinds == ["name", "refused", "timeout", "permission", "host-key", "host-key", "client", "command"]
    assert [error.out_of_reach for error in found] == [k in ("refused", "timeout") for k in kinds]
    texts = [str(error) for error in found]
    assert all("\n" not in text and "Warning" not in text for text in texts)
    assert "log in by hand once: ssh a" in texts[3] and "log in by hand once: ssh a" in texts[4]
    assert "ssh-keygen -R a" in texts[5]
    assert "/opt/none/bin/python" in texts[7]


async def test_a_connection_cut_in_the_middle_is_noticed(hosts: Hosts) -> None:
    ssh = Ssh(("-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=1", *hosts.options))
    task = asyncio.create_task(failure(ssh, "b", "sleep 60", timeout=30))
    await asyncio.sleep(1.0)
    hosts.cut("b")
    try:
        error = await task
    finally:
        hosts.mend("b")
    assert (error.why, error.out_of_reach) == ("timeout", True)


async def test_no_ssh_at_all_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no ssh on this machine's PATH" in str(await failure(Ssh(), "a"))


@pytest.mark.parametrize(
    ("stderr", "why", "said"),
    [
        ("*** Authorised use only ***\nme@a: Permission denied (publickey,password).\n", "permission", "publickey"),
        ("Connection closed by 10.0.0.1 port 22\n", "lost", "closed by 10.0.0.1"),
        ("kex_exchange_identification: read: Connection reset by peer\n", "lost", "reset by peer"),
        ("ssh: connect to host a port 22: No route to host\n", "unreachable", "No route"),
        ("Warning: Permanently added 'a' to the list of known hosts.\n", "other", "it says nothing"),
    ],
)
def test_what_ssh_says_is_put_in_a_sentence(stderr: str, why: Why, said: str) -> None:
    error = explain("a", Result(255, "", stderr))
    assert error is not None
    assert error.why == why
    assert said in str(error)
    assert "Authorised" not in str(error)


def test_a_login_shell_that_lets_nobody_in_is_named() -> None:
    error = explain("a", Result(1, "This account is currently not available.\n", ""))
    assert error is not None and error.why == "permission" and not error.out_of_reach
    assert "login shell" in str(error) and "chsh" in str(error)
    assert explain("a", Result(1, "", "module not known")) is None
    assert "/bin/false" in Result(1, "", "").last_words


async def test_setup_lines_shape_the_program_but_neither_eat_its_input_nor_mix_into_its_output(ssh: Ssh) -> None:
    setup = ("read line || echo no input for setup", "export COLOUR='deep blue'", "echo noise")
    program = "import os, sys; print(os.environ['COLOUR'], sys.argv[1], sys.stdin.read())"
    cluster = Cluster(setup=setup, env={"TOKEN": "hush"})
    command = remote_command(cluster, ["-P", "-c", program, "it's $HOME"])
    result = await ssh.run("a", command, b"told")
    assert result.stdout == "deep blue it's $HOME told\n", result.stderr
    assert "hush" not in command
    assert "no input for setup" in result.stderr
    assert "noise" in result.stderr


async def test_a_setup_line_that_fails_ends_the_command(ssh: Ssh) -> None:
    result = await ssh.run("a", remote_command(Cluster(setup=("echo module not known >&2; false",)), ["-c", "print('ran')"]))
    assert (result.status, result.stdout, result.last_words) == (1, "", "module not known")
