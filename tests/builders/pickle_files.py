"""Write pickles by hand, as Python 2 wrote them."""

from __future__ import annotations

import numpy as np


def python2_pickle(content: dict) -> bytes:
    """Return a pickle as from Python 2 and numpy in 2009: byte strings, and flags as integers."""

    def string(value: bytes) -> bytes:
        return b"T" + len(value).to_bytes(4, "little") + value

    def integers(values) -> bytes:
        return b"".join(b"J" + int(value).to_bytes(4, "little", signed=True) for value in values)

    out = b"\x80\x02}("
    for key, value in content.items():
        out += string(key)
        if isinstance(value, np.ndarray):
            out += (
                b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
                + integers([0])
                + b"\x85"
                + string(b"b")
            )
            out += (
                b"tR("
                + integers([1])
                + integers(value.shape)
                + b"\x86cnumpy\ndtype\n("
                + string(b"u1")
            )
            out += (
                integers([0, 1])
                + b"tR("
                + integers([3])
                + string(b"|")
                + b"NNN"
                + integers([-1, -1, 0])
                + b"tb"
            )
            out += b"\x89" + string(value.tobytes()) + b"tb"
        elif isinstance(value[0], bytes):
            out += b"](" + b"".join(map(string, value)) + b"e"
        else:
            out += b"](" + integers(value) + b"e"
    return out + b"u."
