"""Archives -> image trees: zip or tar of a class tree, or the original Python archives of CIFAR-10 and CIFAR-100.

    unpack(Path("cifar100.zip"), Path("somewhere/images"))      gives somewhere/images/train/<class>/*.png, and test

Archives are not trusted. Members that would leave the target folder, links and devices are rejected. So are archives
that unpack to far more than their own size. The pickles inside the CIFAR archives are read by an unpickler that can
build only lists, dicts and byte arrays.
"""

from __future__ import annotations

import lzma
import os
import re
import shutil
import stat
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath

from common.progress import progress
from common.stop_signal import end_if_stopped
from common.text import listed, quoted
from image_data.image_file import SUFFIXES
from image_data.preparation.cifar_batches import BATCHES, Member, write_batches
from image_data.preparation.image_tree import TEST_NAMES, PrepareError, is_hidden

DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,
    NotImplementedError,
    UnicodeDecodeError,  # of a name in the directory of a zip
    OSError,  # if it has no number, see `_is_of_the_system`
)
# Python's zipfile reads these methods; numbers and names from APPNOTE.TXT, section 4.4.5.
READABLE_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
METHOD_NAMES = {1: "Shrink", 6: "Implode", 9: "Deflate64", 93: "Zstandard", 95: "XZ", 96: "JPEG", 98: "PPMd", 99: "AES"}
IS_ENCRYPTED, IS_UTF8 = 0x0001, 0x0800  # flag bits of a zip member
OTHER_ARCHIVES = {  # first bytes -> kind of archive and the command that unpacks it
    b"7z\xbc\xaf\x27\x1c": ("a 7-Zip archive", "7z x"),
    b"Rar!": ("a RAR archive", "unrar x"),
    b"\x28\xb5\x2f\xfd": ("compressed with Zstandard", "tar --zstd -xf"),
}
SPLITS = [(name,) for name in ("train", *TEST_NAMES)]
# A bomb of the size of an e-mail fills a disk. Images hardly compress, so a factor of 100 is far more than they need.
MAX_RATIO, ALWAYS_ALLOWED_GIB = 100, 0.25


def unpack(archive: Path, target: Path, limit_gib: float | None = None, needs_splits: bool = True) -> None:
    """Write the tree in `archive` into `target`. After an error the caller removes `target`.

    Args:
        limit_gib: largest unpacked size; default: 100 times the size of the archive, at least 0.25 GiB.
        needs_splits: whether the tree must have a train folder; otherwise class folders are enough.

    Raises:
        PrepareError: the archive is unsafe, damaged, of an unsupported kind, or holds no tree.
    """
    try:
        with _members(archive, limit_gib) as members:
            needed, free = sum(member.size for member in members), shutil.disk_usage(target).free
            if needed > free:
                raise PrepareError(
                    f"unpacking {archive} needs {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free in "
                    f"{target.parent}. Free disk space, or choose another --data-dir"
                )
            known = {member.parts[-2] for member in members if len(member.parts) > 1} & set(BATCHES)
            if known:
                write_batches(archive, members, known.pop(), target)
            else:
                _unpack_tree(archive, members, target, needs_splits)
    except DAMAGE as error:
        if _is_of_the_system(error):
            raise
        raise PrepareError(f"{archive} is damaged or cut short ({error}). Delete it and download it again") from None


def check_zip(archive: Path) -> None:
    """Raise PrepareError unless every byte of the zip is intact and it holds train/ and test/."""
    try:
        with _members(archive, None) as members, zipfile.ZipFile(archive) as file:
            root = _root_of_tree(archive, members)
            inside = {
                member.parts[len(root)]
                for member in members
                if member.parts[: len(root)] == root and len(member.parts) > len(root)
            }
            if missing := {"train", "test"} - inside:
                raise PrepareError(f"{archive} holds no {missing.pop()} folder")
            if bad := file.testzip():
                raise PrepareError(f"{archive} is damaged at '{bad}'")
    except DAMAGE as error:
        if _is_of_the_system(error):
            raise
        raise PrepareError(f"{archive} is damaged or cut short ({error})") from None


def _is_of_the_system(error: Exception) -> bool:
    """Whether an error is one of a disk; gzip and bz2 raise an OSError without a number for damaged data."""
    return isinstance(error, OSError) and error.errno is not None


@contextmanager
def _members(archive: Path, limit_gib: float | None) -> Iterator[list[Member]]:
    """Yield the regular files of a zip or tar, after checking names, kinds and sizes of all members."""
    if not archive.is_file():
        raise PrepareError(f"{archive} is not a file. Give --archive the path of a zip or tar archive")
    if zipfile.is_zipfile(archive):
        _refuse_split_zip(archive)
        with zipfile.ZipFile(archive) as file:
            _refuse_unreadable(archive, file.infolist())
            kinds = {0: "file", stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "symbolic link"}
            names = _zip_names(archive, file.infolist())
            entries: Iterable[tuple[str, str, int, Callable]] = [
                (
                    name,
                    "folder"
                    if info.filename.endswith("/")
                    else kinds.get(stat.S_IFMT(info.external_attr >> 16), "device"),
                    info.file_size,
                    partial(file.open, info),
                )
                for name, info in zip(names, file.infolist(), strict=True)
            ]
            yield _safe(archive, entries, limit_gib)
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as file:
            entries = ((info.name, _tar_kind(info), info.size, partial(file.extractfile, info)) for info in file)
            members = _safe(archive, entries, limit_gib)
            _check_end(file)
            yield members
    else:
        raise PrepareError(_why_not_an_archive(archive))


def _why_not_an_archive(archive: Path) -> str:
    with open(archive, "rb") as file:
        start = file.read(8)
    for mark, (kind, command) in OTHER_ARCHIVES.items():
        if start.startswith(mark):
            return (
                f"{archive} is {kind}, which is not supported. Unpack it ({command} {quoted(archive)}) and "
                "use prepare_dataset.py --root"
            )
    if start.startswith(b"PK"):
        return (
            f"{archive} is the beginning of a zip archive: the download is incomplete, or this is one part of a split "
            "archive. Download it again, or unpack all parts (7z x) and use prepare_dataset.py --root"
        )
    return (
        f"{archive} is neither a zip nor a tar archive, or it is cut short. Download it again, or use another --archive"
    )


def _refuse_split_zip(archive: Path) -> None:
    """Raise PrepareError for the last part of a split zip, which alone looks like a damaged one."""
    with open(archive, "rb") as file:
        file.seek(max(0, os.path.getsize(archive) - 66_000))
        end = file.read()
    at = end.rfind(b"PK\5\6")
    disk = int.from_bytes(end[at + 4 : at + 6], "little")
    if at >= 0 and disk not in (0, 0xFFFF):  # 0xFFFF: zip64, where zipfile checks it
        raise PrepareError(
            f"{archive} is the last of {disk + 1} parts of a split archive. "
            f"Unpack all parts (7z x {quoted(archive)}) and use prepare_dataset.py --root"
        )


def _refuse_unreadable(archive: Path, infos: list[zipfile.ZipInfo]) -> None:
    """Raise PrepareError if a member is encrypted, or compressed by a method that Python cannot read."""
    for info in infos:
        if info.flag_bits & IS_ENCRYPTED:
            raise PrepareError(
                f"{archive} is encrypted ('{info.filename}'). "
                f"Unpack it with its password (7z x {quoted(archive)}) and use prepare_dataset.py --root"
            )
        if info.compress_type not in READABLE_METHODS:
            method = METHOD_NAMES.get(info.compress_type, f"method {info.compress_type}")
            raise PrepareError(
                f"{archive} is compressed with {method} ('{info.filename}'), which is not supported. "
                f"Unpack it (7z x {quoted(archive)}) and use prepare_dataset.py --root"
            )


def _zip_names(archive: Path, infos: list[zipfile.ZipInfo]) -> list[str]:
    """Return the names of the members. Without the UTF-8 flag they are tried as UTF-8 first: macOS omits the flag."""
    names, unknown = [], []
    for info in infos:
        name = info.filename
        if not info.flag_bits & IS_UTF8 and not name.isascii():
            try:
                name = name.encode("cp437").decode("utf-8")
            except UnicodeError:
                unknown.append(name)
        names.append(name)
    if unknown:
        print(
            f"warning: {len(unknown)} names in {archive} are not UTF-8 and are read as code page 437: "
            f"{listed(unknown)}. "
            "If they look wrong, unpack the archive with the right encoding and use prepare_dataset.py --root",
            file=sys.stderr,
        )
    return names


def _check_end(file: tarfile.TarFile) -> None:
    """Raise ReadError unless only zeros follow the members of a tar, at least one block of them.

    Without an error, tarfile ends its listing at a damaged header, at a hole and where the file is cut. Reading to the
    end also compares the checksum of a compressed tar.
    """
    stream = file.fileobj
    assert stream is not None
    stream.seek(file.offset)
    block = stream.read(tarfile.BLOCKSIZE)
    if not block:
        raise tarfile.ReadError("the mark of its end is missing")
    while block:
        if block.strip(b"\0"):
            raise tarfile.ReadError(f"there is no header of a file at byte {file.offset}")
        block = stream.read(1 << 20)


def _tar_kind(info: tarfile.TarInfo) -> str:
    if info.isreg() or info.isdir():
        return "file" if info.isreg() else "folder"
    return "symbolic link" if info.issym() else "hard link" if info.islnk() else "device"


def _safe(archive: Path, entries: Iterable[tuple[str, str, int, Callable]], limit_gib: float | None) -> list[Member]:
    """Reject unsafe names and sizes; drop folders and files left by operating systems."""
    members, refused, total = [], [], 0
    default = max(ALWAYS_ALLOWED_GIB, MAX_RATIO * os.path.getsize(archive) / 2**30)
    limit = default if limit_gib is None else limit_gib
    for raw_name, kind, size, opener in entries:
        end_if_stopped(f"reading {archive}")
        total += size
        if total > limit * 2**30:  # checked member by member: to list a compressed tar is to unpack it
            reason = f"{MAX_RATIO} times its size" if limit > ALWAYS_ALLOWED_GIB else "allowed for a small archive"
            reason = "--unpack-limit-gib" if limit_gib is not None else reason
            raise PrepareError(
                f"{archive} ({os.path.getsize(archive) / 2**20:.1f} MiB) unpacks to more than {limit:.2f} GiB "
                f"({reason}). "
                f"If you trust it, run prepare_dataset.py with --unpack-limit-gib {max(1, round(10 * limit))}"
            )
        name = raw_name.replace("\\", "/")
        parts = tuple(part for part in name.split("/") if part not in ("", "."))
        if name.startswith("/") or re.match("[A-Za-z]:/", name) or ".." in parts or "\0" in name:
            refused.append(f"{raw_name} (leads outside)")
        elif kind not in ("file", "folder"):
            refused.append(f"{raw_name} ({kind})")
        elif kind == "file" and parts and not any(map(is_hidden, parts)):
            members.append(Member(parts, size, opener))
    if refused:
        raise PrepareError(
            f"{archive} is rejected because of {len(refused)} unsafe member(s): {listed(refused)}. "
            "Pack plain files and folders only"
        )
    return members


def _root_of_tree(archive: Path, members: list[Member]) -> tuple[str, ...]:
    """Return the folder that contains train/, nearest to the top of the archive."""
    roots = {member.parts[: member.parts.index("train")] for member in members if "train" in member.parts[:-1]}
    if not roots:
        folders = sorted({part for member in members for part in member.parts[:-1]})
        if wrong := next((part for part in folders if part.lower() == "train"), None):
            raise PrepareError(
                f"{archive} holds no train/ folder, but {wrong}/. Unpack it, rename {wrong} to train and "
                "use prepare_dataset.py --root"
            )
        raise PrepareError(
            f"{archive} holds no train/ folder. Expected train/<class>/*.png and test/<class>/*.png, "
            "or an original cifar-10-python.tar.gz or cifar-100-python.tar.gz. "
            "To split class folders into train and test, add --test-fraction 0.2 to prepare_dataset.py"
        )
    depth = min(map(len, roots))
    nearest = sorted("/".join(root) for root in roots if len(root) == depth)
    if len(nearest) > 1:
        raise PrepareError(
            f"{archive} holds several trees ({listed(nearest)}). Unpack it and use one of them as "
            "prepare_dataset.py --root"
        )
    return tuple(PurePosixPath(nearest[0]).parts)


def _root_of_classes(archive: Path, members: list[Member]) -> tuple[str, ...]:
    """Return the folder that contains all class folders, or the one above it if they lie in a folder train."""
    folders = {member.parts[:-1] for member in members if _is_image(member)}
    if len(folders) < 2:
        raise PrepareError(f"{archive} holds images in {len(folders)} folder(s). Expected one folder per class")
    root = tuple(os.path.commonprefix(sorted(folders)))
    return root[: root.index("train")] if "train" in root else root


def _is_image(member: Member) -> bool:
    return os.path.splitext(member.parts[-1])[1].lower() in SUFFIXES


def _unpack_tree(archive: Path, members: list[Member], target: Path, needs_splits: bool) -> None:
    if needs_splits:
        root = _root_of_tree(archive, members)
        wanted = [
            member
            for member in members
            if member.parts[: len(root)] == root and member.parts[len(root) : -1][:1] in SPLITS
        ]
    else:
        root = _root_of_classes(archive, members)
        wanted = [member for member in members if member.parts[: len(root)] == root]
    for member in progress(wanted, len(wanted), "unpacking"):
        file = target.joinpath(*member.parts[len(root) :])
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with member.open() as source, open(file, "xb") as sink:
                shutil.copyfileobj(source, sink)
        except (FileExistsError, NotADirectoryError):
            raise PrepareError(f"{archive} holds '{'/'.join(member.parts)}' twice. Pack it again") from None
