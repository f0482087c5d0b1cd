"""The service's pages: the page for dropping a photo, and the documentation."""

from __future__ import annotations

from http import HTTPStatus
from importlib import resources
from typing import Final

from fastapi import Response
from starlette.exceptions import HTTPException

from vilu.text import csp_hash, render_page

SWAGGER_SCRIPT: Final = """SwaggerUIBundle({
  url: "/openapi.json", dom_id: "#api", deepLinking: true, validatorUrl: null
});"""
"""Script in the documentation. Starts Swagger UI."""

DOCS_PAGE: Final = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>vilu</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/docs/swagger-ui.css">
</head>
<body>
<div id="api"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script>{SWAGGER_SCRIPT}</script>
</body>
</html>
"""
"""The documentation page."""

DOCS_POLICY: Final = "; ".join(
    [
        "default-src 'none'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "style-src 'self' 'unsafe-inline'",
        f"script-src 'self' '{csp_hash(SWAGGER_SCRIPT)}'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
"""Content security policy for the documentation."""

DOCS_FILE_TYPES: Final = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript"}
"""Content types of the Swagger UI files."""


async def photo_page() -> Response:
    """Return the page for dropping a photo."""
    # The page shows the user's photo from a "blob:" address, so its policy must allow such images.
    content, policy = render_page("vilu.service", name="page", images="blob:")
    return _html_response(content, policy)


async def docs_page() -> Response:
    """Return the documentation in Swagger UI. All files come from this service."""
    return _html_response(DOCS_PAGE, DOCS_POLICY)


async def docs_file(name: str) -> Response:
    """Return a file for Swagger UI. Answer 404 to an unknown name."""
    if name not in DOCS_FILE_TYPES:
        raise HTTPException(HTTPStatus.NOT_FOUND)
    package_folder = resources.files("fastapi_offline")
    file = package_folder.joinpath("static", name)
    content = file.read_bytes()
    headers = {"Cache-Control": "max-age=86400"}
    return Response(content, media_type=DOCS_FILE_TYPES[name], headers=headers)


def _html_response(content: str | bytes, policy: str) -> Response:
    headers = {"Content-Security-Policy": policy}
    return Response(content, media_type="text/html; charset=utf-8", headers=headers)
