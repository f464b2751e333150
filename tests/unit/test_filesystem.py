"""The FUSE adapter: one errno for each error, and nothing but FUSEError out of any handler."""

from __future__ import annotations

import contextlib
import errno
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, cast

import pyfuse3
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from lazyimg import errors
from lazyimg.daemon.errnos import ERRNO
from lazyimg.daemon.filesystem import Filesystem
from lazyimg.daemon.handles import Handles, make_table
from lazyimg.daemon.lazyfiles import LazyFiles
from lazyimg.daemon.upper import INODE_BIT, ROOT_INODE, Upper
from lazyimg.errors import ImageNotFound, LazyImgError, LookupUndecided, ReadTimeout

IMAGE_INODE = 1 << 33
# What is raised before the mount is up, to the command line, or caught by the fetcher and the catalog; parents
# of those in the table.  An error that is in neither place fails the first test: decide what it becomes.
NEVER_IN_A_HANDLER = {
    "LazyImgError",
    "Unreachable",
    "ConfigError",
    "DaemonUnreachable",
    "InUse",
    "DestinationRefused",
    "CredentialsRefused",
    "CacheUnusable",
    "MountFailed",
    "RestartRefused",
    "RangesNotSupported",
}


class Failing:
    """Stands for images and upper folder; whatever is asked of it raises."""

    def __init__(self, error: Exception) -> None:
        object.__setattr__(self, "error", error)
        object.__setattr__(self, "images", {})

    def __getattr__(self, name: str) -> Any:
        raise self.error


def failing(error: Exception, after_answers: trio.Nursery) -> Filesystem:
    broken = Failing(error)
    broken.images[IMAGE_INODE] = broken
    return Filesystem(
        cast(LazyFiles, broken),
        cast(Upper, broken),
        trio.CapacityLimiter(1),
        lambda: None,
        after_answers,
        Handles(make_table()),
    )


HANDLERS = sorted(
    name
    for name, function in vars(Filesystem).items()
    if inspect.iscoroutinefunction(function) and hasattr(pyfuse3.Operations, name)
)


def call(filesystem: Filesystem, handler: str, inode: int) -> Any:
    """Call a handler with arguments of the right kinds."""
    function: Callable[..., Any] = getattr(filesystem, handler)
    arguments: list[object] = []
    for parameter in inspect.signature(function).parameters.values():
        kind = str(parameter.annotation)
        if kind.startswith("int"):
            arguments.append(inode)
        elif kind == "bytes":
            arguments.append(b"0" * 40)
        elif kind.startswith("Sequence"):
            arguments.append([(inode, 1)])
        elif kind == "bool":
            arguments.append(False)
        else:
            arguments.append(pyfuse3.SetattrFields() if "Setattr" in kind else None)
    return function(*arguments)


def test_every_error_has_its_errno() -> None:
    """Each kind of error is in the table, or among those that no handler can raise."""
    kinds = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, LazyImgError)
    }
    assert kinds - NEVER_IN_A_HANDLER <= {kind.__name__ for kind in ERRNO}
    assert not {kind.__name__ for kind in ERRNO} & NEVER_IN_A_HANDLER


def test_only_what_is_undecided_is_eagain() -> None:
    """An error is never ENOENT, which a caller takes for absence."""
    assert {kind for kind, number in ERRNO.items() if number == errno.EAGAIN} == {LookupUndecided}
    assert set(ERRNO.values()) == {errno.EIO, errno.EAGAIN}


def test_handlers_are_found() -> None:
    """The tests below see the handlers that a guest depends on."""
    assert {"read", "lookup", "getattr", "open", "release", "readdir", "setattr", "statfs"} <= set(HANDLERS)


@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("inode", [ROOT_INODE, IMAGE_INODE, INODE_BIT | 5])
async def test_a_bug_leaves_no_handler(
    handler: str, inode: int, nursery: trio.Nursery, expected_warnings: Callable[..., None]
) -> None:
    """[I6] Whatever a handler meets, a bug of ours too, it raises FUSEError or answers: all else ends the mount."""
    expected_warnings("failed in an unforeseen way", required=False)
    with contextlib.suppress(pyfuse3.FUSEError):
        await call(failing(RuntimeError("a bug"), nursery), handler, inode)
    # What goes on after an answer must not raise either.
    await wait_all_tasks_blocked()


async def test_a_bug_is_eio_and_logged(nursery: trio.Nursery, expected_warnings: Callable[..., None]) -> None:
    """[I6] A bug becomes EIO with its traceback in the log."""
    expected_warnings("ERROR lazyimg.daemon.filesystem: .*failed in an unforeseen way")
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await call(failing(KeyError("x"), nursery), "getattr", IMAGE_INODE)
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (ReadTimeout("too late"), errno.EIO),
        (ImageNotFound("gone"), errno.EIO),
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (OSError("without a number"), errno.EIO),
        (FileNotFoundError(errno.ENOENT, "not there"), errno.ENOENT),
    ],
)
async def test_errors_become_their_numbers(
    error: Exception, number: int, nursery: trio.Nursery, expected_warnings: Callable[..., None]
) -> None:
    """An error of the table becomes its number, one of the system keeps its own."""
    expected_warnings("WARNING lazyimg.daemon.filesystem: getattr: ", required=False)
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await call(failing(error, nursery), "getattr", IMAGE_INODE)
    assert caught.value.errno == number


async def test_release_counts_only_after_its_answer(nursery: trio.Nursery) -> None:
    """[I9] A release that is not answered yet changes nothing: the kernel sends it to the next daemon again."""
    released: list[int] = []

    class Files:
        images: ClassVar[dict[int, object]] = {}

        async def release(self, inode: int, _count: int) -> None:
            released.append(inode)

    filesystem = Filesystem(
        cast(LazyFiles, Files()),
        cast(Upper, None),
        trio.CapacityLimiter(1),
        lambda: None,
        nursery,
        Handles(make_table()),
    )
    await filesystem.release(IMAGE_INODE)
    assert not released
    await wait_all_tasks_blocked()
    assert released == [IMAGE_INODE]
