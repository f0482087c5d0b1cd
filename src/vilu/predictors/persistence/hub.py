"""How predictors are copied to and from a model hub, or a folder in place of a hub."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple
from urllib.parse import unquote, urlsplit

from vilu.artifacts.disk import (
    convert_os_errors,
    file_hash,
    host_hash,
    is_leftover,
    make_folder,
    temporary_paths,
)
from vilu.artifacts.documents import DIGEST_KEY, MAX_DOCUMENT_BYTES, read_json, without_version
from vilu.artifacts.paths import claim_folder
from vilu.errors import (
    DataError,
    MissingModelError,
    ProvenanceError,
    StorageError,
    UsageError,
    ViLUError,
)
from vilu.extras import import_extra, is_hub_reachable, suppress_messages
from vilu.predictors.persistence.card import HUB_ID, without_version_of_vilu
from vilu.predictors.persistence.description import (
    FINGERPRINT_KEY,
    RECALIBRATE_ADVICE,
    fit_fingerprint,
    is_predictor_file,
    read_description,
)
from vilu.predictors.persistence.files import (
    CARD,
    LIKELY,
    LOOKS,
    PREDICTOR,
    RISK,
    ROWS,
    SAMPLE,
    VOCABULARY,
    WEIGHTS,
    SavedModel,
    folder_of,
)
from vilu.predictors.persistence.fit_sample import MAX_FILE_BYTES
from vilu.predictors.persistence.storage import load_predictor
from vilu.predictors.persistence.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

MAX_FILE_SIZES = {
    WEIGHTS: 4 * 2**30,
    PREDICTOR: MAX_DOCUMENT_BYTES,
    CARD: 2**20,
    RISK: MAX_DOCUMENT_BYTES,
    ROWS: 2**30,
    LOOKS: MAX_DOCUMENT_BYTES,
    LIKELY: MAX_DOCUMENT_BYTES,
    VOCABULARY: 2**30,
    SAMPLE: MAX_FILE_BYTES,
}
"""Maps the name of a predictor file to the file's maximum size in bytes.

Only these files are copied. None of these files is a pickle or code. ``2**30`` is one GiB.
"""


@contextmanager
def temporary_folder_beside(target: Path) -> Iterator[Path]:
    """Make an empty temporary folder next to ``target``, and remove the folder after the block.

    If the block raises no error, temporary folders of killed processes are removed, too.
    """
    unique_suffix = f"{host_hash()}.{os.getpid()}.{secrets.token_hex(4)}"
    temporary_path = target.with_name(f".{target.name}.{unique_suffix}.tmp")
    folder = make_folder(temporary_path)
    try:
        yield folder
        parent = target.parent.absolute()
        # ``temporary_paths`` returns the same dictionary at every call. ``pop`` removes the folders
        # from the dictionary, so that no later call finds these folders.
        paths_of_name = temporary_paths(parent)
        temporary_folders = paths_of_name.pop(target.name, [])
        for temporary in temporary_folders:
            if is_leftover(temporary):
                shutil.rmtree(temporary, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def copy_predictor_files(
    source: Path,
    destination: Path,
    *,
    cache: Path | None = None,
    excluded_names: frozenset[str] = frozenset(),
) -> str:
    """Copy a predictor's files into an empty folder, and check the copy by loading it.

    Returns the predictor's fingerprint. Files named in ``excluded_names`` are not copied.
    Symbolic links are refused, unless the links lead to files in the hub's ``cache``.
    """
    if not source.exists():
        raise UsageError(f"{source} does not exist.")
    if not source.is_dir():
        raise DataError(f"no predictor here: {source} is no folder. Make one with `vilu fit`.")
    if source.is_symlink():
        raise UsageError(
            f"{source} is a symbolic link, so it could be anything on this machine. Give the "
            "folder that it leads to."
        )
    with (
        convert_os_errors(f"cannot copy {source} to {destination}"),
        _open_folder(source) as folder,
    ):
        for name, limit in MAX_FILE_SIZES.items():
            if name in excluded_names:
                continue
            descriptor = _open_file(folder, name, cache)
            if descriptor is None:
                continue
            copy_path = destination / name
            with os.fdopen(descriptor, "rb") as content, copy_path.open("xb") as copy_file:
                require_max_size(str(source / name), os.fstat(descriptor).st_size, limit)
                shutil.copyfileobj(content, copy_file)
                copy_file.flush()
                os.fsync(copy_file.fileno())
    return check_copy(destination, source)


class _OpenFolder(NamedTuple):
    """A folder kept open while its files are copied.

    The files are opened relative to the folder's descriptor, not by their paths. So if another
    process puts another folder at this path during the copy, the copied files are still from the
    opened folder.
    """

    path: Path
    descriptor: int | None  # None on Windows, where files cannot be opened relative to a folder

    def path_of(self, name: str) -> str:
        """Return a file's path, for ``os`` functions with ``dir_fd=self.descriptor``."""
        if self.descriptor is None:
            return str(self.path / name)
        return name


@contextmanager
def _open_folder(folder: Path) -> Iterator[_OpenFolder]:
    """Open a folder for the block."""
    if os.name == "nt":
        yield _OpenFolder(folder, descriptor=None)
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield _OpenFolder(folder, descriptor)
    finally:
        os.close(descriptor)


# Flags for ``os.open``. ``os.open`` then does not follow a link, does not wait for a pipe, and does
# not convert line ends. A flag missing on the system is 0.
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)
_BINARY = getattr(os, "O_BINARY", 0)
_FLAGS = os.O_RDONLY | _NO_FOLLOW | _NO_WAIT | _BINARY


def _open_file(folder: _OpenFolder, name: str, cache: Path | None) -> int | None:
    """Open a file in a folder. Return the descriptor, or None if the file does not exist.

    Raises:
        UsageError: If the file is a symbolic link, unless the link leads to a file in the
            ``cache``.
        DataError: If the file is not a regular file.
    """
    path = folder.path / name
    relative_path = folder.path_of(name)
    try:
        status = os.stat(relative_path, dir_fd=folder.descriptor, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(status.st_mode):
        target = _target_in_cache(path, cache)
        descriptor = os.open(target, _FLAGS)
    else:
        descriptor = os.open(relative_path, _FLAGS, dir_fd=folder.descriptor)
    opened_status = os.fstat(descriptor)
    if not stat.S_ISREG(opened_status.st_mode):
        os.close(descriptor)
        raise DataError(f"{path} is no regular file. Remove it, or put the file there.")
    return descriptor


def _target_in_cache(link: Path, cache: Path | None) -> str:
    """Resolve a symbolic link. Refuse a target outside the hub's cache."""
    if cache is None:
        raise UsageError(
            f"{link} is a symbolic link, so it could be anything on this machine. Copy the file."
        )
    real_link = os.path.realpath(link)
    file = Path(real_link)
    real_cache = os.path.realpath(cache)
    if not file.is_relative_to(real_cache):
        raise UsageError(
            f"{link} is a symbolic link that leads out of the cache of the hub, {cache}. Remove "
            "that folder, and pull again."
        )
    return str(file)


def require_max_size(name: str, size: int, limit: int) -> None:
    """Refuse a file with the given ``name`` if the file has more bytes than the ``limit``."""
    if size > limit:
        raise DataError(
            f"{name} has {size:,} bytes; this file of a predictor has at most {limit:,}."
        )


def check_copy(folder: Path, original_folder: Path) -> str:
    """Check a copied predictor by loading all its files. Return the fingerprint.

    ``folder`` is the copy. Error messages name the original folder instead.
    """
    try:
        load_predictor(folder)
        if (folder / RISK).is_file():
            _check_calibration(folder)
        if (folder / VOCABULARY).is_file():
            Vocabulary.load(folder)
        for document in (LOOKS, LIKELY):
            if (folder / document).is_file():
                # reading checks the file's digest
                read_json(folder / document, RECALIBRATE_ADVICE)
        return str(read_description(folder / PREDICTOR)[FINGERPRINT_KEY])
    except ViLUError as error:
        message = str(error).replace(str(folder), str(original_folder))
        raise type(error)(message) from error


def _check_calibration(folder: Path) -> None:
    """Refuse a calibration made for another predictor, or without calibration rows."""
    risk = read_json(folder / RISK, RECALIBRATE_ADVICE)
    if risk.get("predictor") != fit_fingerprint(folder):
        raise ProvenanceError(
            f"{folder / RISK} was made for another predictor than the one beside it, so its "
            f"guarantee does not hold for the one beside it. {RECALIBRATE_ADVICE}, or remove the "
            "file."
        )
    rows_path = folder / ROWS
    has_right_rows = rows_path.is_file() and file_hash(rows_path) == risk.get("rows_sha256")
    if not has_right_rows:
        raise DataError(
            f"{rows_path} does not hold the rows that {RISK} names. {RECALIBRATE_ADVICE}."
        )


def _comparable_content(path: Path) -> object:
    """Return a file's content or hash, without vilu's version, to compare two copies of the file.

    If the file does not exist, return None.
    """
    if not path.is_file():
        return None
    if path.name == CARD:
        card = path.read_bytes()
        return without_version_of_vilu(card)
    if path.suffix != ".json":
        return file_hash(path)
    try:
        if path.name == PREDICTOR:
            document = read_description(path)
        else:
            document = read_json(path, RECALIBRATE_ADVICE)
    except ViLUError:  # a damaged file differs from every intact file, and is replaced
        return file_hash(path)
    return without_version(document, FINGERPRINT_KEY, DIGEST_KEY)


def _have_same_files(first: Path, second: Path) -> bool:
    """Return whether two folders have the same predictor files, with the same content."""
    for name in MAX_FILE_SIZES:
        if _comparable_content(first / name) != _comparable_content(second / name):
            return False
    return True


def replace_folder(staged_folder: Path, target: Path) -> None:
    """Replace the folder ``target`` by the finished folder ``staged_folder``.

    Other processes see the old folder or the new folder, and for a moment no folder.
    """
    with (
        convert_os_errors(f"cannot put the predictor into {target}"),
        temporary_folder_beside(target) as temporary,
    ):
        old_folder = temporary / "old"
        try:
            if target.exists():
                target.rename(old_folder)
            staged_folder.rename(target)
        finally:  # put the old folder back if the second rename failed, or did not begin (Ctrl-C)
            if old_folder.exists() and not target.exists():
                old_folder.rename(target)


ERROR_REASONS = {
    "GatedRepoError": "it is gated; ask for access on its page, and set HF_TOKEN",
    "RepositoryNotFoundError": (
        "the hub has no such name, or it is private and the account of HF_TOKEN may not see it"
    ),
    "RevisionNotFoundError": "it has no such revision",
    "LocalEntryNotFoundError": (
        "it is not complete in the cache of the hub, "
        "and the hub is not asked (HF_HUB_OFFLINE) or cannot be reached"
    ),
    "HFValidationError": "that is no name of a repository",
}
"""Maps the class name of a huggingface_hub error to the reason in a message."""

FOLDER_PREFIX = re.compile(r"(\.{1,2}|~)([/\\]|$)|[/\\]|[A-Za-z]:[/\\]")
"""How a path to a folder begins: /, ./, ../, ~/ or a drive."""


def push(
    folder: str | Path | SavedModel,
    repository: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    with_sample: bool = False,
) -> str:
    """Copy a saved predictor to a model hub repository, or to a folder. Return the address.

    Only predictor files are copied, without changes. If the predictor lacks files from an earlier
    push, these files are removed. Symbolic links are refused.

    Args:
        folder: A saved predictor, or a ``vilu.Selective``. The predictor is loaded once before the
            copy.
        repository: ORG/NAME, created if missing. Or a folder, as ./DIR, /DIR or file:///DIR.
        private: Whether only the owner can see a newly created repository. If None, the owner's
            settings decide.
        revision: The repository's branch. If None, main.
        overwrite: Replace another predictor in a folder. On the hub, a predictor is always
            replaced, but earlier revisions stay available.
        with_sample: Also copy the sample of the fit's images. Without the sample, near copies
            of fitted images among calibration rows cannot be detected.

    Raises:
        UsageError: If ``repository`` is the folder of the predictor itself.
    """
    target_folder = local_folder(repository, revision)
    excluded_names: frozenset[str] = frozenset()
    if not with_sample:
        excluded_names = frozenset({SAMPLE})
    if target_folder is not None:
        source = folder_of(folder)
        if target_folder.resolve() == source.resolve():
            raise UsageError(f"{target_folder} is the predictor itself. Give another folder.")
        copied_folder = _copy_to_folder(
            source, target_folder, overwrite=overwrite, excluded_names=excluded_names
        )
        return str(copied_folder)
    with tempfile.TemporaryDirectory() as staged_folder:
        copy_predictor_files(folder_of(folder), Path(staged_folder), excluded_names=excluded_names)
        return _upload(Path(staged_folder), repository, private, revision)


def pull(
    repository: str, folder: str | Path, *, revision: str | None = None, overwrite: bool = False
) -> Path:
    """Copy a predictor from a model hub repository, or from a folder. Return ``folder``.

    Only predictor files are copied. The files are first copied to a temporary folder and
    loaded there. Then the temporary folder replaces ``folder``. Symbolic links are refused, except
    for links in the hub's cache.

    Args:
        repository: ORG/NAME, or a folder, as for ``push``.
        folder: Folder to write.
        revision: The repository's branch, tag or commit. If None, main.
        overwrite: Replace another predictor in ``folder``.
    """
    claim_folder(folder, "predictor", is_predictor_file, overwrite=True)
    destination = Path(folder)
    source_folder = local_folder(repository, revision)
    if source_folder is not None:
        return _copy_to_folder(source_folder, destination, overwrite=overwrite)
    snapshot = _download(repository, revision)
    # ``snapshot`` is CACHE/snapshots/REVISION, which has symbolic links to files in CACHE/blobs
    cache = snapshot.parents[1]
    return _copy_to_folder(snapshot, destination, overwrite=overwrite, cache=cache)


def local_folder(repository: str, revision: str | None) -> Path | None:
    """Return the folder at the path ``repository``. If that is ORG/NAME on the hub, return None.

    A ``revision`` for a folder is refused, because folders have no revisions.
    """
    if repository.startswith("file://"):
        url = urlsplit(repository)
        if url.netloc not in {"", "localhost"}:
            raise UsageError(
                f"a file URL of this machine begins with file:///. Got {repository!r} instead."
            )
        folder_path = unquote(url.path)
        folder = Path(folder_path)
    elif FOLDER_PREFIX.match(repository):
        folder = Path(repository).expanduser()
    elif HUB_ID.fullmatch(repository):
        return None
    else:
        raise UsageError(
            "expected ORG/NAME on the model hub, or a folder that begins with ./ or /. "
            f"Got {repository!r} instead."
        )
    if revision is not None:
        raise UsageError(f"{repository} is a folder, which has no revisions. Leave --revision out.")
    return folder


def _copy_to_folder(
    source: Path,
    target: Path,
    *,
    overwrite: bool,
    cache: Path | None = None,
    excluded_names: frozenset[str] = frozenset(),
) -> Path:
    """Copy a predictor to the folder ``target``, unless the same predictor is there."""
    # user files are refused before anything is copied
    claim_folder(target, "predictor", is_predictor_file, overwrite=True)
    resolved_target = target.resolve()
    with temporary_folder_beside(resolved_target) as staged_folder:
        copy_predictor_files(source, staged_folder, cache=cache, excluded_names=excluded_names)
        is_same = _have_same_files(staged_folder, resolved_target)
        has_same_predictor = claim_folder(
            target, "predictor", is_predictor_file, has_same_inputs=is_same, overwrite=overwrite
        )
        if has_same_predictor:
            logger.info("%s holds that predictor already: there is nothing to do", target)
        else:
            replace_folder(staged_folder, resolved_target)
    return target


def _upload(
    staged_folder: Path, repository: str, private: bool | None, revision: str | None
) -> str:
    """Upload a folder to a hub repository. Return the commit's address."""
    hub = _reachable_hub(repository, "pushed to")
    if hub.get_token() is None:
        raise UsageError(
            f"pushing to {repository} needs a token: set HF_TOKEN, or run `hf auth login`."
        )
    absent_names = [name for name in MAX_FILE_SIZES if not (staged_folder / name).exists()]
    with suppress_messages(), _translated_errors(repository, revision):
        api = hub.HfApi(library_name="vilu")
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=staged_folder,
            revision=revision,
            allow_patterns=list(MAX_FILE_SIZES),
            delete_patterns=absent_names,
            commit_message="A predictor of vilu",
        )
    return str(commit.commit_url)


def _download(repository: str, revision: str | None) -> Path:
    """Download a revision to the hub's cache. Return the folder in the cache.

    With HF_HUB_OFFLINE set, the revision must already be in the cache.
    """
    hub = import_extra("huggingface_hub", "hub")
    from huggingface_hub import constants

    with _translated_errors(repository, revision):
        if not constants.HF_HUB_OFFLINE:
            _reachable_hub(repository, "pulled from")
            client = hub.HfApi(library_name="vilu")
            info = client.model_info(repository, revision=revision, files_metadata=True)
            files = info.siblings or ()  # ``siblings`` is None if the hub lists no files
            sizes = {file.rfilename: file.size for file in files}
            missing_files = [name for name in (PREDICTOR, WEIGHTS) if name not in sizes]
            if missing_files:
                missing_names = " and no ".join(missing_files)
                raise DataError(f"{repository} holds no predictor: it has no {missing_names}.")
            for name, limit in MAX_FILE_SIZES.items():
                # 0 if the repository does not have the file, or does not know the file's size
                size = sizes.get(name) or 0
                require_max_size(f"{name} of {repository}", size, limit)
        snapshot = hub.snapshot_download(
            repository, revision=revision, allow_patterns=list(MAX_FILE_SIZES)
        )
        return Path(snapshot)


def _reachable_hub(repository: str, action: Literal["pushed to", "pulled from"]) -> ModuleType:
    """Import the hub's library. If the hub cannot be reached, raise MissingModelError.

    The message begins with "ORG/NAME cannot be pushed to:" or "ORG/NAME cannot be pulled from:".
    """
    hub = import_extra("huggingface_hub", "hub")
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise MissingModelError(
            f"{repository} cannot be {action}: HF_HUB_OFFLINE is set. Unset it."
        )
    if not is_hub_reachable():
        raise MissingModelError(
            f"{repository} cannot be {action}: {constants.ENDPOINT} cannot be reached. "
            "Check the network. With HF_HUB_OFFLINE=1 a predictor is pulled from the cache of the "
            "hub. A folder (./DIR) can be used in place of a repository."
        )
    return hub


@contextmanager
def _translated_errors(repository: str, revision: str | None) -> Iterator[None]:
    """Turn errors from the hub's library, raised in the block, into vilu errors."""
    from huggingface_hub import errors

    # If a connection fails, the HTTP client raises an error of its own base class. Which client is
    # used depends on the library's version. The library's HTTP error is derived from this class.
    client_errors = [
        base for base in errors.HfHubHTTPError.__bases__ if issubclass(base, Exception)
    ]
    expected_errors: tuple[type[Exception], ...] = (
        OSError,
        errors.HFValidationError,
        RuntimeError,
        *client_errors,
    )
    try:
        yield
    except expected_errors as error:
        # Errors from the hub are OSErrors, too. Only file system errors have a number.
        if isinstance(error, OSError) and error.errno is not None:
            raise StorageError(f"the cache of the hub cannot be used: {error}.") from error
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        reason = _reason(error)
        if reason is None and status in {401, 403}:
            raise UsageError(
                f"the hub refuses {repository} (HTTP {status}): the account of HF_TOKEN may not "
                "use it."
            ) from error
        if reason is None:
            message = str(error) or type(error).__name__
            first_line = message.splitlines()[0]
            reason = f"the hub or the connection to it failed: {first_line.rstrip('.')}"
        raise MissingModelError(
            f"{repository}, revision {revision or 'main'}: {reason}."
        ) from error


def _reason(error: Exception) -> str | None:
    """Return the reason in ``ERROR_REASONS`` for an error's class, or the nearest base class."""
    for cls in type(error).__mro__:
        if cls.__name__ in ERROR_REASONS:
            return ERROR_REASONS[cls.__name__]
    return None
