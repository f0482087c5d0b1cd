"""Test accepted labels in XMP sidecars, which exiftool reads back."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.builders.photo_folders import photo
from tests.triage.conftest import job_on
from vilu.guard.guard import Answer
from vilu.triage.sidecars import write_sidecars
from vilu.triage.sorting import accepted_labels, list_folder, sort_photos


def answer(key: str, decision: str, label: str = "cat & <dog>") -> Answer:
    return Answer(key, label, 0.1, 0.1, decision, None)


def write(folder: Path, *answers: Answer) -> int:
    photo_folder = list_folder(folder, folder / "out")
    return write_sidecars(accepted_labels(folder / "out", photo_folder, answers, job_on(folder)))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(photo(0, 1))
    return tmp_path


def test_exiftool_reads_the_labels(photos: Path) -> None:
    exiftool = shutil.which("exiftool")
    if exiftool is None:
        pytest.skip("exiftool is not installed")
    before = (photos / "a.png").read_bytes()
    assert write(photos, answer("a.png", "accept"), answer("b.png", "review")) == 1
    command = [exiftool, "-json", "-XMP-dc:Subject", photos / "a.png.xmp"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert json.loads(done.stdout)[0]["Subject"] == "cat & <dog>"
    assert (photos / "a.png").read_bytes() == before
    assert not (photos / "b.png.xmp").exists()


def test_a_label_that_is_no_longer_accepted_is_taken_back(photos: Path) -> None:
    write(photos, answer("a.png", "accept"))
    write(photos, answer("a.png", "accept", "car"))
    assert "<rdf:li>car</rdf:li>" in (photos / "a.png.xmp").read_text()
    assert write(photos, answer("a.png", "review")) == 0
    assert not (photos / "a.png.xmp").exists()


def foreign(subjects: str, about: str = "") -> bytes:
    """Return a sidecar as other programs write it, with the XML ``subjects`` in it."""
    return (
        "<?xpacket begin='\ufeff' id='W5M0MpCehiHzreSzNTczkc9d'?>\r\n"
        "<x:xmpmeta xmlns:x='adobe:ns:meta/' x:xmptk='XMP Core 5.5'><r:RDF "
        "xmlns:r='http://www.w3.org/1999/02/22-rdf-syntax-ns#'>\r\n"
        f"<r:Description r:about='{about}' xmlns:d='http://purl.org/dc/elements/1.1/' "
        f"xmlns:xmp='http://ns.adobe.com/xap/1.0/' xmp:Rating='3'>{subjects}</r:Description>"
        "</r:RDF></x:xmpmeta>\n<?xpacket end='w'?>"
    ).encode()


TWO = "<d:subject><r:Bag><r:li>Ä &amp; b</r:li>\n<r:li>blue</r:li>\n</r:Bag></d:subject>"


def subjects_of(sidecar: Path) -> list[str | None]:
    """Return the subjects as ElementTree reads them."""
    dc = "{http://purl.org/dc/elements/1.1/}"
    rdf = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
    root = ElementTree.fromstring(sidecar.read_bytes())  # noqa: S314 - the files of this test
    return [item.text for item in root.findall(f".//{dc}subject/{rdf}Bag/{rdf}li")]


@pytest.mark.parametrize(
    ("subjects", "before"), [(TWO, ["Ä & b", "blue"]), ("", []), ("<xmp:Label>x</xmp:Label>", [])]
)
def test_a_label_goes_into_a_sidecar_and_back(
    photos: Path, subjects: str, before: list[str]
) -> None:
    sidecar = photos / "a.png.xmp"
    content = foreign(subjects, about="uuid:1&amp;2")
    sidecar.write_bytes(content)
    sidecar.chmod(0o640)
    for label in ("cat & <dog>", "car"):  # the second label replaces the first
        assert write(photos, answer("a.png", "accept", label)) == 1
        assert subjects_of(sidecar) == [*before, label]
        assert stat.S_IMODE(sidecar.stat().st_mode) == 0o640
    once = sidecar.read_bytes()
    write(photos, answer("a.png", "accept", "car"))
    assert sidecar.read_bytes() == once
    assert once.startswith(content[:200])
    assert write(photos, answer("a.png", "review")) == 0
    assert sidecar.read_bytes() == content


@pytest.mark.parametrize("subjects", [TWO, ""])
def test_a_subject_of_another_program_beside_ours_is_never_removed(
    photos: Path, caplog: pytest.LogCaptureFixture, subjects: str
) -> None:
    sidecar = photos / "a.png.xmp"
    sidecar.write_bytes(foreign(subjects))
    write(photos, answer("a.png", "accept", "cat"))
    item = b"<r:li>cat</r:li>"
    changed = sidecar.read_bytes().replace(item, item + b"<r:li>holiday</r:li>")
    assert changed.count(b"holiday") == 1
    sidecar.write_bytes(changed)
    for decision in ("accept", "review"):
        assert write(photos, answer("a.png", decision, "car")) == 0
        assert sidecar.read_bytes() == changed
    assert "another program has changed what vilu added" in caplog.text


def test_a_prefix_in_braces_is_text_as_any(photos: Path) -> None:
    sidecar = photos / "a.png.xmp"
    sidecar.write_bytes(foreign("", about="uuid:{p}"))
    assert write(photos, answer("a.png", "accept", "{p}")) == 1
    assert subjects_of(sidecar) == ["{p}"]
    rdf = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
    root = ElementTree.fromstring(sidecar.read_bytes())  # noqa: S314 - written by this test
    about = {element.get(f"{rdf}about") for element in root.iter(f"{rdf}Description")}
    assert about == {"uuid:{p}"}
    write(photos, answer("a.png", "review"))
    assert sidecar.read_bytes() == foreign("", about="uuid:{p}")


def test_a_subject_that_is_there_stays_where_it_is(photos: Path) -> None:
    sidecar = photos / "a.png.xmp"
    sidecar.write_bytes(foreign(TWO))
    assert write(photos, answer("a.png", "accept", "blue")) == 1
    write(photos, answer("a.png", "review"))
    assert sidecar.read_bytes() == foreign(TWO)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'<x:xmpmeta x:xmptk="other"/>', "it is no XML"),  # a prefix without a namespace
        (b"<a/>", "0 elements rdf:RDF"),
        (foreign(TWO + TWO), "several elements dc:subject"),
        (foreign("<d:subject>blue</d:subject>"), "holds no rdf:Bag"),
        (foreign("<d:subject><r:Bag/></d:subject>"), "rdf:Bag is empty"),
        (foreign(TWO).decode().encode("utf-16"), "UTF-16"),
        (
            b'<?xml version="1.0" encoding="latin-1"?>' + foreign(TWO)[60:],
            "its encoding is latin-1",
        ),
        (b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "declares entities"),
        (b"", "it is no XML"),
    ],
)
def test_a_sidecar_that_is_not_understood_stays(
    photos: Path, caplog: pytest.LogCaptureFixture, content: bytes, reason: str
) -> None:
    (photos / "a.png.xmp").write_bytes(content)
    assert write(photos, answer("a.png", "accept")) == 0
    assert reason in caplog.text
    assert write(photos, answer("a.png", "review")) == 0
    assert (photos / "a.png.xmp").read_bytes() == content


def test_a_label_that_xml_cannot_hold_is_refused(
    photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert write(photos, answer("a.png", "accept", "bell \a")) == 0
    assert not (photos / "a.png.xmp").exists()
    assert "XML cannot hold" in caplog.text


def test_a_link_in_place_of_a_sidecar_is_not_followed(photos: Path) -> None:
    (photos / "precious").write_bytes(foreign(TWO))
    (photos / "a.png.xmp").symlink_to("precious")
    assert write(photos, answer("a.png", "accept")) == 0
    assert (photos / "precious").read_bytes() == foreign(TWO)


def test_escaped_labels_are_read_by_any_parser(photos: Path) -> None:
    assert write(photos, answer("a.png", "accept", 'a]]> & "b" <!--é-->')) == 1
    assert subjects_of(photos / "a.png.xmp") == ['a]]> & "b" <!--é-->']


def test_exiftool_reads_a_label_beside_its_own(photos: Path) -> None:
    exiftool = shutil.which("exiftool")
    if exiftool is None:
        pytest.skip("exiftool is not installed")
    sidecar = photos / "a.png.xmp"
    own = ["-XMP-dc:Subject=red", "-XMP-dc:Subject=blue", "-XMP:Rating=3"]
    command = [exiftool, "-q", "-o", sidecar, *own, photos / "a.png"]
    subprocess.run(command, capture_output=True, check=True)
    before = sidecar.read_bytes()
    assert write(photos, answer("a.png", "accept")) == 1
    command = [exiftool, "-json", "-XMP-dc:Subject", "-XMP:Rating", sidecar]
    done = subprocess.run(command, capture_output=True, check=True)
    (tags,) = json.loads(done.stdout)
    assert tags["Subject"] == ["red", "blue", "cat & <dog>"]
    assert tags["Rating"] == 3
    write(photos, answer("a.png", "review"))
    assert sidecar.read_bytes() == before


def test_a_sidecar_moves_with_its_photo(photos: Path) -> None:
    (photos / "b.png.xmp").write_bytes(foreign(TWO))
    answers = [answer("a.png", "accept", "car"), answer("b.png", "accept", "car")]
    write(photos, *answers)
    out = photos / "out"
    out.mkdir()
    sort_photos(out, list_folder(photos, out), answers, job_on(photos), "move")
    accepted = out / "sorted" / "accepted" / "car"
    assert sorted(path.name for path in accepted.iterdir()) == [
        "a.png",
        "a.png.xmp",
        "b.png",
        "b.png.xmp",
    ]
    assert not list(photos.glob("*.xmp"))
    answers = [answer("a.png", "accept", "cat"), answer("b.png", "review")]
    write(photos, *answers)
    sort_photos(out, list_folder(photos, out), answers, job_on(photos), "move")
    assert subjects_of(out / "sorted" / "accepted" / "cat" / "a.png.xmp") == ["cat"]
    assert (out / "sorted" / "review" / "b.png.xmp").read_bytes() == foreign(TWO)
