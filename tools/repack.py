"""Make a source package the same bytes at every build: `python tools/repack.py dist/NAME.tar.gz`.

The build writes each file's time and owner. Here all files get the time SOURCE_DATE_EPOCH and no
owner, and are sorted. (The wheel is built from the source package, and setuptools sets the times in
the wheel.)
"""

from __future__ import annotations

import gzip
import io
import os
import sys
import tarfile
from pathlib import Path


def repack(package: bytes, epoch: int) -> bytes:
    """Return the same package without the differences from build to build."""
    buffer = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(package)) as old_archive,
        gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=epoch) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as new_archive,
    ):
        for member in sorted(old_archive.getmembers(), key=lambda member: member.name):
            member.mtime, member.uid, member.gid, member.uname, member.gname = epoch, 0, 0, "", ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.pax_headers = {}
            new_archive.addfile(
                member, old_archive.extractfile(member) if member.isfile() else None
            )
    return buffer.getvalue()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        package_file = Path(name)
        built_package = package_file.read_bytes()
        repacked = repack(built_package, int(os.environ["SOURCE_DATE_EPOCH"]))
        package_file.write_bytes(repacked)
