"""A config drive: a folder as an ISO image labelled config-2, with Joliet and Rock Ridge names, as Nova's."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from lazyimg.errors import ConfigError
from lazyimg.overlay.placement import refusing

if TYPE_CHECKING:
    from pycdlib import PyCdlib

# What cloud-init and cloudbase-init look for (nova.virt.configdrive).
LABEL = "config-2"


def write_config_drive(folder: Path, dest: Path) -> None:
    """Write the tree below `folder` to the ISO image `dest`.

    Raises ConfigError if it is no folder, has something else than files and folders in it, or a name that an
    ISO image cannot have.
    """
    # Imported here: 0.1 s that no other command needs.
    from pycdlib import PyCdlib
    from pycdlib.pycdlibexception import PyCdlibException

    if not folder.is_dir():
        raise ConfigError(f"config drive {folder}: not a folder; give one with --config-drive")
    iso = PyCdlib()
    iso.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident=LABEL)
    try:
        _add_tree(iso, folder)
        with refusing(dest):
            iso.write(str(dest))
    except PyCdlibException as exc:
        raise ConfigError(f"config drive {folder}: {exc}; give shorter names or fewer levels") from exc
    finally:
        iso.close()


def _add_tree(iso: PyCdlib, folder: Path) -> None:
    # ISO 9660's own names are eight characters of a small alphabet: they are counted, and nobody reads them.
    # Rock Ridge and Joliet carry the real ones.
    plain_names = {folder: ""}
    count = 0
    for parent, folders, files in os.walk(folder, onerror=_raise_unreadable):
        here = Path(parent)
        folders.sort()
        for name in folders + sorted(files):
            count += 1
            path = here / name
            mode = path.lstat().st_mode
            joliet = f"/{path.relative_to(folder)}"
            if stat.S_ISDIR(mode):
                plain_names[path] = f"{plain_names[here]}/D{count:07}"
                iso.add_directory(plain_names[path], rr_name=name, joliet_path=joliet)
            elif stat.S_ISREG(mode):
                plain = f"{plain_names[here]}/F{count:07}.;1"
                iso.add_file(str(path), plain, rr_name=name, joliet_path=joliet)
            else:
                raise ConfigError(f"config drive {folder}: {joliet} is neither file nor folder; remove it")


def _raise_unreadable(exc: OSError) -> None:
    raise ConfigError(f"config drive {exc.filename}: {exc.strerror}; give a readable folder") from exc
