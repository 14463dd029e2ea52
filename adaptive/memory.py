"""What a process keeps of memory that loading took, and in which pages: advice to Linux, which others do without."""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

THP = Path("/sys/kernel/mm/transparent_hugepage")
COLLAPSE = 25  # MADV_COLLAPSE, since Linux 6.1


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """While graphs are made: behind it, what they took lies in huge pages, and what only making them needed is gone.

    Args:
        folder: that they lie in.
    """
    before = _filled()
    yield
    give_back()
    widen(_filled() - before)
    forget(folder)
    give_back()


def give_back() -> None:
    """Returns memory to the system that was freed; glibc would keep it. 20 MB after a prompt of 512 tokens."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library
        pass


def widen(places: set[int]) -> None:
    """Moves memory to huge pages: decoding reads all weights for every token, and in small pages, which programs get
    unless they ask, a tenth of its time goes into finding where these lie.

    Args:
        places: addresses, as `_filled` gives them.
    """
    for place in places:
        _advise(place, place + _huge(), COLLAPSE)


def forget(folder: Path) -> None:
    """Lets go of pages of files that only loading, or reading a prompt, needed; what is read again comes back from the
    system's cache.

    Products have packed copies of their weights: the pages that these were packed from are 18 MB. Another 25 MB are
    code and tables, of onnxruntime most of all, that nothing needs while tokens are generated.
    """
    ours = rf"(?:r-.. (?:\S+ +){{3}}/.*|.*{re.escape(str(folder))}/.*\.bin)"  # onnxruntime maps weights as writable
    pages = rf"^(\w+)-(\w+) {ours}\n(?:(?!Anonymous)[A-Z].*\n)*Anonymous: +0 kB"  # and writes to none
    for start, end in re.findall(pages, _read("/proc/self/smaps"), re.MULTILINE):
        _advise(int(start, 16), int(end, 16), getattr(mmap, "MADV_DONTNEED", 4))


def _filled() -> set[int]:
    """Returns the addresses of all stretches, as long as a huge page, that hold private data throughout: what is
    partly free would take more memory than it does."""
    size, page, found = _huge(), mmap.PAGESIZE, set()
    maps = re.findall(r"^(\w+)-(\w+) rw-p \S+ 00:00 0 ", _read("/proc/self/maps"), re.MULTILINE) if size else []
    with suppress(OSError), open("/proc/self/pagemap", "rb", buffering=0) as table:  # some systems do not show it
        for start, end in maps:
            for place in range(-(-int(start, 16) // size) * size, int(end, 16) // size * size, size):
                table.seek(place // page * 8)
                entries = np.frombuffer(table.read(size // page * 8), np.uint64)
                if np.count_nonzero(entries >> np.uint64(63)) > 0.9 * size / page:
                    found.add(place)
    return found


def _huge() -> int:
    """Returns how long a huge page is; 0 where there are none, or where whoever runs the machine wants none."""
    return 0 if "[never]" in _read(THP / "enabled") else int(_read(THP / "hpage_pmd_size") or 0)


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text("utf-8", "surrogateescape")  # names of mapped files are any bytes
    except OSError:  # another system
        return ""


def _advise(start: int, end: int, advice: int) -> None:
    try:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
    except (AttributeError, OSError, TypeError):  # another system: it drops pages when it needs the room
        pass
