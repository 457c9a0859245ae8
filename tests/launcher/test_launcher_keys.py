"""A run's keys: made once whoever makes them, readable by the owner alone, and good for nothing but the run and the role."""

from __future__ import annotations

import datetime
import os
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cryptography import x509

from midwatch.run_directory import RunPaths
from midwatch.transport.tls_identity import (
    KeysError,
    RunKeys,
    TlsIdentity,
    client_context,
    load_identity,
    peer_of,
    server_context,
    store_identity,
)


def keys_at(root: Path) -> RunKeys:
    RunPaths(root).create()
    return RunKeys.ensure(RunPaths(root))


def handshake(listens: TlsIdentity, connects: TlsIdentity | None) -> tuple[str, tuple[str, str] | None, tuple[str, str] | None]:
    """A real handshake over a real socket: (what went wrong, who the server sees, who the client sees)."""
    left, right = socket.socketpair()
    seen: dict[str, tuple[str, str]] = {}
    wrong: list[str] = []

    def serve() -> None:
        try:
            with server_context(listens).wrap_socket(left, server_side=True) as tls:
                seen["server"] = peer_of(tls)
                tls.sendall(b"welcome")
                tls.recv(10)
        except (OSError, KeysError) as error:
            wrong.append(str(error))
            left.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        if connects is not None:
            context = client_context(connects)
        else:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with context.wrap_socket(right, server_hostname="controller") as tls:
            assert tls.recv(10) in (b"welcome", b"")
            assert tls.version() == "TLSv1.3"
            if connects is not None:
                seen["client"] = peer_of(tls)
    except OSError as error:
        wrong.insert(0, str(error))
        right.close()
    thread.join(5)
    return (wrong[0] if wrong else ""), seen.get("server"), seen.get("client")


def test_the_keys_of_a_run_are_made_once_and_read_ever_after(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    first, again = RunKeys.ensure(paths), RunKeys.ensure(paths)
    assert handshake(first.issue("controller", "head"), again.issue("agent", "n1"))[0] == ""
    assert paths.keys.stat().st_mode & 0o777 == 0o700
    assert [f.stat().st_mode & 0o777 for f in paths.keys.iterdir()] == [0o600]
    assert list(paths.keys.parent.iterdir()) == [paths.keys]


def test_of_many_that_make_the_keys_at_once_all_get_the_same(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from midwatch.run_directory import RunPaths\n"
    code += "from midwatch.transport.tls_identity import RunKeys\n"
    code += "sys.stdin.read(); sys.stdout.write(RunKeys.ensure(RunPaths(Path(sys.argv[1]))).issue('agent', 'n').authority)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    racers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.close()
        racer.stdin = None
    authorities = {racer.communicate(timeout=30)[0] for racer in racers}
    assert len(authorities) == 1 and "BEGIN CERTIFICATE" in authorities.pop()
    assert [p.name for p in (tmp_path / "control").iterdir()] == ["keys"]


def test_controller_and_agent_know_each_others_role_and_name(tmp_path: Path) -> None:
    keys = keys_at(tmp_path)
    for name in ("gpu-01.cluster", "x" * 250, "ünï:codé/%3A", "controller"):
        wrong, server, client = handshake(keys.issue("controller", "head"), keys.issue("agent", name))
        assert (wrong, server, client) == ("", ("agent", name), ("controller", "head"))


def test_an_agents_key_cannot_pose_as_the_controller_nor_the_other_way_round(tmp_path: Path) -> None:
    keys = keys_at(tmp_path)
    agent, controller = keys.issue("agent", "controller"), keys.issue("controller", "head")
    assert "unsuitable certificate purpose" in handshake(agent, agent)[0]
    wrong, server, _ = handshake(controller, controller)
    assert "unsupported certificate" in wrong and server is None


def test_another_runs_key_and_no_key_at_all_are_refused_by_both_sides(tmp_path: Path) -> None:
    ours, theirs = keys_at(tmp_path / "a"), keys_at(tmp_path / "b")
    controller, stranger = ours.issue("controller", "head"), theirs.issue("agent", "n")
    mixed = TlsIdentity(stranger.certificate, stranger.key, controller.authority)
    assert "verify failed" in handshake(controller, stranger)[0]
    wrong, server, _ = handshake(controller, mixed)
    assert wrong and server is None
    wrong, server, _ = handshake(controller, None)
    assert wrong and server is None


def test_certificates_bear_clocks_a_day_apart_and_long_runs(tmp_path: Path) -> None:
    identity = keys_at(tmp_path).issue("agent", "n")
    now = datetime.datetime.now(datetime.UTC)
    for pem in (identity.certificate, identity.authority):
        certificate = x509.load_pem_x509_certificate(pem.encode())
        assert now - certificate.not_valid_before_utc >= datetime.timedelta(hours=23)
        assert certificate.not_valid_after_utc - now > datetime.timedelta(days=3650)


def test_an_identity_travels_as_one_line_and_never_shows_its_key(tmp_path: Path) -> None:
    import rich.pretty

    keys = keys_at(tmp_path)
    identity = keys.issue("agent", "n")
    line = identity.encode()
    assert b"\n" not in line and TlsIdentity.decode(line) == identity
    for shown in (repr(identity), str(identity), f"{[identity]}", rich.pretty.pretty_repr(identity), repr(keys)):
        assert "PRIVATE" not in shown and "BEGIN" not in shown
    with pytest.raises(KeysError) as caught:
        TlsIdentity.decode(line[:-9])
    assert "BEGIN" not in str(caught.value) and caught.value.__suppress_context__


def test_an_identity_is_kept_for_its_owner_alone_and_refused_where_others_can_read_it(tmp_path: Path) -> None:
    identity, file = keys_at(tmp_path).issue("agent", "n"), Path(os.environ["XDG_RUNTIME_DIR"]) / "n.identity"
    old = os.umask(0)
    try:
        store_identity(identity, file)
    finally:
        os.umask(old)
    assert file.stat().st_mode & 0o777 == 0o600
    assert load_identity(file) == identity
    file.chmod(0o640)
    with pytest.raises(KeysError, match="chmod 600"):
        load_identity(file)
    file.chmod(0o600)
    file.write_text("{}")
    with pytest.raises(KeysError, match="holds no identity"):
        load_identity(file)
    with pytest.raises(KeysError, match="No such file"):
        load_identity(tmp_path / "none")
    with pytest.raises(KeysError, match="cannot be kept there"):
        store_identity(identity, file / "below")


def test_damaged_keys_say_where_they_lie_and_what_to_do(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    identity = RunKeys.ensure(paths).issue("agent", "n")
    file = next(paths.keys.iterdir())
    store_identity(identity, file)
    certificate = identity.certificate.replace("A", "B", 40)
    store_identity(TlsIdentity(certificate, identity.key, identity.authority), file)
    with pytest.raises(KeysError, match=f"{file}: damaged; move"):
        RunKeys.ensure(paths)
    with pytest.raises(KeysError, match="cannot be used"):
        server_context(TlsIdentity(certificate, identity.key, identity.authority))
