"""A certificate authority of one test run, and certificates for 127.0.0.1 signed by it. Made by openssl."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

EXTENSIONS = "subjectAltName=IP:127.0.0.1,DNS:localhost\nextendedKeyUsage=serverAuth,clientAuth\n"


def why_not() -> str | None:
    """Why no certificates can be made here, or None."""
    return None if shutil.which("openssl") else "openssl is not installed"


class Authority:
    """Signs certificates. `certificate` is what its clients trust."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.certificate = directory / f"{name}.pem"
        self._key = directory / f"{name}.key"
        _openssl(
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}",
            "-keyout", self._key, "-out", self.certificate,
        )  # fmt: skip

    def issue(self, name: str) -> Path:
        """A file with a certificate for this host and its key."""
        key, request, signed = (self.directory / f"{name}.{kind}" for kind in ("key", "csr", "crt"))
        extensions = self.directory / f"{name}.ext"
        extensions.write_text(EXTENSIONS)
        _openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", "-keyout", key, "-out", request)
        _openssl(
            "x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial",
            "-days", "2", "-extfile", extensions, "-out", signed,
        )  # fmt: skip
        both = self.directory / f"{name}-both.pem"
        both.touch(0o600)
        both.write_text(signed.read_text() + key.read_text())
        return both


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, stdin=subprocess.DEVNULL)
