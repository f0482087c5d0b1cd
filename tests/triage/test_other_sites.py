"""Test that pages from other sites cannot use the page of ``vilu review --serve``."""

from __future__ import annotations

import http.client
import json
import queue
import threading
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.triage.conftest import Folder
from vilu.triage.review import open_review
from vilu.triage.serve import ReviewSession, serve_page


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://{host}", 200),
        ("http://127.0.0.1:9", 403),
        ("https://{host}", 403),
        ("null", 403),
    ],
)
def test_a_page_of_another_origin_writes_no_label(
    begun: Folder, tmp_path: Path, origin: str, status: int
) -> None:
    """The answer is refused even if the other page knows the right key."""
    session = ReviewSession(open_review(begun[0] / "half"), tmp_path / "labels.csv")
    addresses: queue.Queue[str] = queue.Queue()
    arguments = (session, 0, addresses.put)
    threading.Thread(target=serve_page, args=arguments, daemon=True).start()
    url = urlsplit(addresses.get(timeout=10))
    body = json.dumps({"index": 0, "label": "cat"})
    headers = {"Origin": origin.format(host=url.netloc)}
    with closing(http.client.HTTPConnection(url.netloc, timeout=10)) as connection:
        connection.request("POST", f"/answer?{url.query}", body, headers)
        assert connection.getresponse().status == status
    assert (tmp_path / "labels.csv").exists() == (status == 200)
