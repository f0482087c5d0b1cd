"""Reads, adds and removes subjects (keywords) in XMP. All other bytes stay unchanged."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final
from xml.parsers import expat
from xml.sax.saxutils import escape, quoteattr

from vilu.errors import DataError

RDF_NAMESPACE: Final = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
DUBLIN_CORE_NAMESPACE: Final = "http://purl.org/dc/elements/1.1/"

# Names of elements and attributes in the parser's form: namespace, blank, name.
ROOT_TAG: Final = f"{RDF_NAMESPACE} RDF"
DESCRIPTION_TAG: Final = f"{RDF_NAMESPACE} Description"
ABOUT_ATTRIBUTE: Final = f"{RDF_NAMESPACE} about"
BAG_TAG: Final = f"{RDF_NAMESPACE} Bag"
ITEM_TAG: Final = f"{RDF_NAMESPACE} li"
SUBJECT_TAG: Final = f"{DUBLIN_CORE_NAMESPACE} subject"

# Comments around each addition by vilu to another program's XMP. Readers of XMP ignore
# comments. vilu finds the additions by these comments, to remove them again.
ADDITION_BEGIN: Final = "<!--vilu-->"
ADDITION_END: Final = "<!--/vilu-->"

SIDECAR_TEMPLATE: Final = """<?xml version="1.0" encoding="UTF-8"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="vilu">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/">
   <dc:subject><rdf:Bag><rdf:li>{label}</rdf:li></rdf:Bag></dc:subject>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
"""
"""XMP with one subject (XMP specification, part 1)."""

# Patterns for vilu's two addition forms: a whole description, or only an item in a bag.
# Another tool may have put white space between the tags. Example of a description:
#   <rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/">
#   <dc:subject><rdf:Bag><rdf:li>sea</rdf:li></rdf:Bag></dc:subject></rdf:Description>
_PREFIX: Final = r"(?:[^\s<>/:]+:)?"  # the RDF prefix, for example "rdf:"
_DESCRIPTION_START: Final = (
    rf"<{_PREFIX}Description {_PREFIX}about=(?:\"[^<>\"]*\"|'[^<>']*')"
    rf" xmlns:dc=\"{re.escape(DUBLIN_CORE_NAMESPACE)}\">"
    rf"\s*<dc:subject>\s*<{_PREFIX}Bag>\s*"
)
_DESCRIPTION_END: Final = rf"</{_PREFIX}Bag>\s*</dc:subject>\s*</{_PREFIX}Description>\s*"
_ITEM: Final = rf"<{_PREFIX}li>[^<>]*</{_PREFIX}li>\s*"
_SUBJECT: Final = rf"(?:{_DESCRIPTION_START}{_ITEM}{_DESCRIPTION_END}|{_ITEM})"
ADDITION_PATTERN: Final = re.compile(rf"{ADDITION_BEGIN}\s*{_SUBJECT}{ADDITION_END}".encode())
"""Matches an addition by vilu: both comments, with the elements and any label between them."""

FORBIDDEN_CHARACTER: Final = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Matches a character that XML 1.0 does not allow."""


def new_xmp(subject: str) -> bytes:
    """Make XMP with a single subject. Raises DataError if XML cannot hold the subject."""
    escaped_subject = _escaped(subject)
    return SIDECAR_TEMPLATE.format(label=escaped_subject).encode()


def _escaped(subject: str) -> str:
    """Escape a subject as XML text. Raises DataError if XML cannot hold the subject."""
    if FORBIDDEN_CHARACTER.search(subject):
        raise DataError("the label has a character that XML cannot hold")
    return escape(subject)


@dataclass
class Xmp:
    """Parsed XMP. Positions are byte indices.

    Attributes:
        subjects: Subjects in the bag of ``dc:subject``.
        bag_end_positions: End tag position for every bag of subjects.
        root_end_positions: End tag position for every ``rdf:RDF``.
        n_subject_elements: How many elements are ``dc:subject``.
        about: Value of ``rdf:about`` in the first description. "" means the file itself. None
            without a description.
        addition_spans: Start and end position of every addition by vilu.
    """

    subjects: list[str] = field(default_factory=list)
    bag_end_positions: list[int] = field(default_factory=list)
    root_end_positions: list[int] = field(default_factory=list)
    n_subject_elements: int = 0
    about: str | None = None
    addition_spans: list[tuple[int, int]] = field(default_factory=list)


class _Reader:
    """Handlers for the parser. The handlers fill an ``Xmp``."""

    def __init__(self) -> None:
        self.xmp = Xmp()
        # names of the elements around the present position, the innermost element last
        self._open_elements: list[str] = []
        # position of an ``ADDITION_BEGIN`` with no ``ADDITION_END`` found yet
        self._addition_start: int | None = None
        self._parser = expat.ParserCreate(namespace_separator=" ")
        self._parser.buffer_text = True
        self._parser.StartElementHandler = self._start_tag
        self._parser.EndElementHandler = self._end_tag
        self._parser.CharacterDataHandler = self._characters
        self._parser.CommentHandler = self._comment
        self._parser.StartDoctypeDeclHandler = self._doctype
        self._parser.XmlDeclHandler = self._declaration

    def read(self, data: bytes) -> Xmp:
        """Parse XMP. Raises DataError if the XMP is invalid."""
        try:
            self._parser.Parse(data, True)
        except expat.ExpatError as error:
            raise DataError(f"it is no XML ({error})") from error
        return self.xmp

    def _start_tag(self, name: str, attributes: dict[str, str]) -> None:
        self._open_elements.append(name)
        is_description = self._open_elements[-2:] == [ROOT_TAG, DESCRIPTION_TAG]
        if is_description and self.xmp.about is None:
            self.xmp.about = attributes.get(ABOUT_ATTRIBUTE, "")
        if self._open_elements[-3:] == [ROOT_TAG, DESCRIPTION_TAG, SUBJECT_TAG]:
            self.xmp.n_subject_elements += 1
        if self._is_in_bag() and name == ITEM_TAG:
            self.xmp.subjects.append("")

    def _is_in_bag(self) -> bool:
        """Return whether the innermost open element is a child of a subject bag."""
        four_around_innermost = self._open_elements[-5:-1]
        return four_around_innermost == [ROOT_TAG, DESCRIPTION_TAG, SUBJECT_TAG, BAG_TAG]

    def _end_tag(self, name: str) -> None:
        position = self._parser.CurrentByteIndex
        if self._open_elements[-4:] == [ROOT_TAG, DESCRIPTION_TAG, SUBJECT_TAG, BAG_TAG]:
            self.xmp.bag_end_positions.append(position)
        if name == ROOT_TAG:
            self.xmp.root_end_positions.append(position)
        self._open_elements.pop()

    def _characters(self, text: str) -> None:
        if self._is_in_bag() and self._open_elements[-1] == ITEM_TAG:
            self.xmp.subjects[-1] += text

    def _comment(self, text: str) -> None:
        position = self._parser.CurrentByteIndex
        comment = f"<!--{text}-->"  # the parser gives the text alone
        if comment == ADDITION_BEGIN:
            self._addition_start = position
        if comment == ADDITION_END and self._addition_start is not None:
            self.xmp.addition_spans.append((self._addition_start, position + len(ADDITION_END)))
            self._addition_start = None

    def _doctype(self, *_: object) -> None:
        raise DataError("it declares entities (DOCTYPE), which are not read")

    def _declaration(self, _version: str, encoding: str | None, _alone: int) -> None:
        if encoding is not None and encoding.lower() not in {"utf-8", "utf8"}:
            raise DataError(f"its encoding is {encoding}; UTF-8 was expected")


def read_xmp(data: bytes) -> Xmp:
    """Find subjects. Raises DataError if ``data`` is no XML in UTF-8, or declares entities."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError("its encoding is UTF-16; UTF-8 was expected")
    return _Reader().read(data)


def remove_added_subject(data: bytes) -> bytes:
    """Remove the subject that vilu added to XMP.

    Raises:
        DataError: If another program has changed the addition. The change would be lost.
    """
    # The last addition is removed first, so the positions of earlier additions stay valid.
    for begin, end in reversed(read_xmp(data).addition_spans):
        if ADDITION_PATTERN.fullmatch(data[begin:end]) is None:
            raise DataError("another program has changed what vilu added to it")
        data = data[:begin] + data[end:]
    return data


def add_subject(data: bytes, subject: str) -> bytes:
    """Add a subject to another program's XMP. Data with this subject stays unchanged.

    Raises:
        DataError: If the place for the subject is not clear.
    """
    xmp = read_xmp(data)
    n_roots = len(xmp.root_end_positions)
    if n_roots != 1:
        raise DataError(f"it has {n_roots} elements rdf:RDF; one was expected")
    if xmp.n_subject_elements > 1:
        raise DataError("it has several elements dc:subject")
    if subject in xmp.subjects:
        return data
    if xmp.n_subject_elements == 0:
        addition = _new_description(xmp)
    elif len(xmp.bag_end_positions) == 1:
        addition = _Addition(xmp.bag_end_positions[0], tag_name="Bag", opening="", closing="")
    else:
        raise DataError("its dc:subject holds no rdf:Bag")
    escaped_subject = _escaped(subject)
    merged = addition.insert_into(data, escaped_subject)
    if read_xmp(merged).subjects != [*xmp.subjects, subject]:
        raise DataError("the label could not be added to its subjects")
    return merged


@dataclass(frozen=True)
class _Addition:
    """The place to insert a bag item, and the item's enclosing elements."""

    position: int  # position of the end tag before which the item is inserted
    tag_name: str  # name of this end tag, without the RDF prefix
    opening: str  # tags before the item. "{p}" stands for the RDF prefix.
    closing: str  # tags after the item

    def insert_into(self, data: bytes, text: str) -> bytes:
        """Insert the item ``text``. Raises DataError if there is no end tag at the position."""
        # For example "</rdf:Bag>", where the group is "rdf:".
        pattern = rf"</((?:[^\s<>/:]+:)?){self.tag_name}\s*>".encode()
        end_tag = re.compile(pattern).match(data, self.position)
        if end_tag is None:  # an element without content has a single tag
            raise DataError(f"its rdf:{self.tag_name} is empty")
        prefix = end_tag.group(1).decode()
        item = f"<{prefix}li>{text}</{prefix}li>"
        opening = self.opening.replace("{p}", prefix)
        closing = self.closing.replace("{p}", prefix)
        added = f"{ADDITION_BEGIN}{opening}{item}{closing}{ADDITION_END}".encode()
        return data[: self.position] + added + data[self.position :]


def _new_description(xmp: Xmp) -> _Addition:
    """Return the addition of a new description.

    The new description has the same ``rdf:about`` as the first description.
    """
    # A "{p}" in the value would be replaced by the prefix (``insert_into``), so "{" is escaped.
    about = quoteattr(xmp.about or "", {"{": "&#123;"})
    opening = (
        f"<{{p}}Description {{p}}about={about} xmlns:dc={quoteattr(DUBLIN_CORE_NAMESPACE)}>"
        "<dc:subject><{p}Bag>"
    )
    closing = "</{p}Bag></dc:subject></{p}Description>"
    (end,) = xmp.root_end_positions  # ``add_subject`` has checked that there is a single root
    return _Addition(end, tag_name="RDF", opening=opening, closing=closing)
