"""Damage bytes as disks, networks and attackers do."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from hypothesis import strategies as st

WORDS = (
    *(
        b"../",
        b"..\\",
        b"/etc/passwd",
        b"\x00",
        b"\n",
        b"\r\n",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"%s%n",
        b"{{7*7}}",
        b"{% if %}",
    ),
    *(
        b"<script>alert(1)</script>",
        b"</script>",
        b"<!--",
        b'"><img src=x onerror=alert(1)>',
        b"=1+1",
        b"-->",
        b"&lt;",
    ),
    *(
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"null",
        b"true",
        b"[]",
        b"{}",
        b'""',
        b"-1",
        b"0",
        b"9" * 40,
        b"1e-320",
    ),
    *(
        b"[" * 500,
        b"{" * 500,
        b'{"a":' * 200,
        b"," * 300,
        b'"' * 3,
        b"\\u0000",
        b"\\ud800",
        "\u202e".encode(),
        "é".encode(),
    ),
    *(
        b"pipe:touch x",
        b"http://127.0.0.1:9/x",
        b"file:///etc/passwd",
        b"__class__",
        b"cos\nsystem\n(S'touch x'\ntR.",
    ),
)
"""Texts that parsers, shells, templates and spreadsheets have failed on."""

NUMBERS = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
LONGEST = 1 << 16


def damaged(seeds: Sequence[bytes], random: Random) -> bytes:
    """Return one seed after one to six changes, or in one case out of 16 random bytes."""
    if random.random() < 1 / 16:
        return random.randbytes(random.choice((0, 1, 7, 64, 600)))
    data = bytearray(random.choice(seeds))
    for _ in range(random.choice((1, 1, 1, 2, 3, 6))):
        _change(data, seeds, random)
    return bytes(data[:LONGEST])


def _change(data: bytearray, seeds: Sequence[bytes], random: Random) -> None:
    at = random.randrange(len(data) + 1)
    if random.random() < 0.3:  # headers are at the ends
        at = min(at, 64) if random.random() < 0.5 else max(len(data) - at, 0)
    length = random.choice((1, 2, 4, 8, 64, 512))
    match random.randrange(8):
        case 0 if at < len(data):
            data[at] ^= 1 << random.randrange(8)
        case 1:
            data[at : at + length] = random.randbytes(length)
        case 2:
            data[at : at + random.choice((0, length))] = random.choice(WORDS)
        case 3:
            size = random.choice((1, 2, 4, 8))
            number = random.choice(NUMBERS) % 256**size
            data[at : at + size] = number.to_bytes(size, random.choice(("little", "big")))
        case 4:
            del data[at:]
        case 5:
            del data[at : at + length]
        case 6:
            data[at:at] = data[at : at + length] * random.choice((1, 2, 50))
        case _:
            other = random.choice(seeds)
            start = random.randrange(len(other) + 1)
            data[at : at + length] = other[start : start + length]


def damages(seeds: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Return the same as a strategy for hypothesis.

    The whole change depends on one number, which is quick to draw and to repeat.
    """
    return st.integers(0, 2**64 - 1).map(lambda number: damaged(seeds, Random(number)))
