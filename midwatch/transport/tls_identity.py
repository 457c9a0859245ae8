"""The keys of a run: an authority of its own, and what it signs, so that nodes and controller know each other and nobody else.

The authority's key lies in RUN/control/keys, for the run's owner alone; whoever can read it can take part in the run. A node gets
an `TlsIdentity`: its certificate, its key and the authority to check others by. Both sides of a connection show one. A controller's
is good for listening and an agent's for connecting, so an agent's key cannot pose as the controller.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import secrets
import ssl
import stat
import tempfile
import urllib.parse
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, cast

import msgspec

from midwatch.run_directory import RunPaths, write_atomically
from shards.common.decoding import DecodeError, json_as

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

Role = Literal["controller", "agent"]

SKEW = datetime.timedelta(days=1)
"""How far the clocks of two nodes may be apart."""
LIFE = datetime.timedelta(days=20 * 365)
"""A run ends before its certificates do: what they open ends with the run."""
AUTHORITY_FILE = "authority.json"
ANY_NODE = "*"
"""The name in a key whose holder may speak for any node."""


class KeysError(Exception):
    """The keys of a run cannot be made, read or used; the message says where and what to do."""


class TlsIdentity(msgspec.Struct, frozen=True):
    """What one process shows and checks others by, each part in PEM. Secret as a whole: it holds a private key."""

    certificate: str
    key: str
    authority: str

    def __repr__(self) -> str:
        return "Identity(…)"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return []

    def encode(self) -> bytes:
        """One line of JSON, without the newline."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, line: bytes) -> TlsIdentity:
        """Raises KeysError; what was read is not repeated in the message."""
        try:
            return json_as(line, cls)
        except DecodeError:
            raise KeysError("an identity was expected, and what came is none") from None


class RunKeys:
    """A run's authority."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key, self._certificate = key, certificate

    def __repr__(self) -> str:
        return "RunKeys(…)"

    @classmethod
    def ensure(cls, paths: RunPaths) -> RunKeys:
        """Reads the run's keys, or makes them; of several that make them at once, all get the same. Raises KeysError."""
        if not (paths.keys / AUTHORITY_FILE).exists():
            _make(paths.keys)
        return cls._read(paths.keys / AUTHORITY_FILE)

    @classmethod
    def _read(cls, file: Path) -> RunKeys:
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        own = load_identity(file)
        try:
            key = load_pem_private_key(own.key.encode(), None)
            certificate = x509.load_pem_x509_certificate(own.certificate.encode())
            if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
                raise ValueError
        except (ValueError, TypeError):
            raise KeysError(f"{file}: damaged; move {file.parent} away and start the run's controller and agents anew") from None
        return cls(key, certificate)

    def issue(self, role: Role, name: str) -> TlsIdentity:
        """Signs a new identity; `name` is the host or node that it is for."""
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID

        key = ec.generate_private_key(ec.SECP256R1())
        good_for = ExtendedKeyUsageOID.SERVER_AUTH if role == "controller" else ExtendedKeyUsageOID.CLIENT_AUTH
        names = [x509.DNSName(role), x509.UniformResourceIdentifier(f"midwatch:{role}:{urllib.parse.quote(name, safe='')}")]
        certificate = (
            _draft(role, self._certificate.subject, key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.ExtendedKeyUsage([good_for]), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return _identity(key, certificate, self._certificate)


def _make(directory: Path) -> None:
    """Makes an authority under another name and renames the directory: it is there whole or not at all, and only one wins."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"midwatch run {secrets.token_hex(8)}")])
    unused = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign")
    usage = dict.fromkeys((*unused, "digital_signature", "encipher_only", "decipher_only"), False)
    certificate = (
        _draft(name.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value, name, key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(key_cert_sign=True, **usage), critical=True)
        .sign(key, hashes.SHA256())
    )
    try:
        directory.parent.mkdir(exist_ok=True)
        mine = Path(tempfile.mkdtemp(prefix=".keys.", dir=directory.parent))  # 0700
        write_atomically(mine / AUTHORITY_FILE, _identity(key, certificate, certificate).encode())
    except OSError as error:
        raise KeysError(f"{directory}: the run's keys cannot be made: {error.strerror}") from None
    try:
        os.rename(mine, directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            (mine / AUTHORITY_FILE).unlink()
            mine.rmdir()
        if not (directory / AUTHORITY_FILE).exists():
            raise KeysError(f"{directory}: the run's keys cannot be put there: {error.strerror}") from None


def _draft(name: str | bytes, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, str(name))]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + LIFE)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _identity(key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate, authority: x509.Certificate) -> TlsIdentity:
    from cryptography.hazmat.primitives import serialization

    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return TlsIdentity(certificate.public_bytes(pem).decode(), private.decode(), authority.public_bytes(pem).decode())


# Keeping


def store_identity(identity: TlsIdentity, file: Path) -> None:
    """Writes a file that its owner alone can read, whole or not at all."""
    try:
        write_atomically(file, identity.encode(), mode=0o600)
    except OSError as error:
        raise KeysError(f"{file}: the identity cannot be kept there: {error.strerror}") from None


def load_identity(file: Path) -> TlsIdentity:
    """Raises KeysError; also where others than its owner could have read or written the file."""
    try:
        with file.open("rb") as source:
            status = os.fstat(source.fileno())
            content = source.read()
    except OSError as error:
        raise KeysError(f"{file}: the identity cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode) or os.getuid() not in (status.st_uid, 0):
        raise KeysError(f"{file}: belongs to somebody else; a key must be one's own")
    if status.st_mode & 0o077:
        raise KeysError(
            f"{file}: others can read this key (chmod 600 {file}; if they may have, move it away and start the run anew)"
        )
    try:
        return TlsIdentity.decode(content)
    except KeysError:
        raise KeysError(f"{file}: holds no identity") from None


# Using


def server_context(identity: TlsIdentity) -> ssl.SSLContext:
    """For listening: TLS 1.3, and only peers that show a certificate of the run's authority."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, identity)
    context.num_tickets = 0  # nobody resumes; each connection shows its certificate
    return context


def client_context(identity: TlsIdentity) -> ssl.SSLContext:
    """For connecting with `server_hostname="controller"`: only a controller of the same run is spoken to."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, identity)


CONTROLLER_NAME = "controller"
"""What a client asks the certificate to be of, whatever host it connects to: addresses change, the role does not."""


def peer_of(tls: ssl.SSLObject | ssl.SSLSocket) -> tuple[Role, str]:
    """Role and name from the certificate that the peer has shown. Raises KeysError for one that Midwatch did not write."""
    names = cast(tuple[tuple[str, str], ...], (tls.getpeercert() or {}).get("subjectAltName", ()))
    for kind, value in names:
        words = value.split(":")
        if kind == "URI" and len(words) == 3 and words[0] == "midwatch" and words[1] in ("controller", "agent"):
            return cast(Role, words[1]), urllib.parse.unquote(words[2])
    raise KeysError("the certificate names no role in a run")


def _context(protocol: int, identity: TlsIdentity) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(cadata=identity.authority)
        with _nameless() as chain:
            chain.write((identity.certificate + identity.key).encode())
            chain.flush()
            context.load_cert_chain(f"/dev/fd/{chain.fileno()}")
    except (ssl.SSLError, OSError, ValueError):
        raise KeysError("the identity's certificate and key cannot be used; get a new one by starting the agent anew") from None
    return context


def _nameless() -> IO[bytes]:
    """A file for the key, since ssl takes it from a file only; this one is on no disk where the system can do that."""
    return os.fdopen(os.memfd_create("identity"), "w+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()
