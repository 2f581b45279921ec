"""Write and read the lists of an IVF index as a separate file, in the layout of FAISS's OnDiskInvertedLists.

A search maps the file into memory. It is written list by list from parts that fit into memory, without FAISS's own
merge, which prints to stdout and ends the process if the disk is full.
"""

from pathlib import Path
from typing import Any

import numpy as np

from image_search.faiss_index import blocks, import_faiss, readable, write
from runtime.files import folder_beside, written_whole
from utils import UserError

IN_MEMORY = 2**22  # number of vectors in a part: at 72 bytes each, 300 MB
ID_BYTES = 8


def fill(index: Any, features: np.ndarray, file: Path) -> None:
    """Add the features that an index lacks, as `faiss_index.add` does, and write all its lists to a file.

    Args:
        index: trained index; lists from `read` remain unchanged on disk.
    """
    with folder_beside(file) as folder:
        parts = [index.invlists] if index.ntotal else []
        _fresh_lists(index)
        start = sum(part.compute_ntotal() for part in parts)
        for block in blocks(features, start):
            index.add_with_ids(block, np.arange(start, start + len(block)))
            start += len(block)
            if index.ntotal >= IN_MEMORY:
                parts.append(_moved_to(index, folder / str(len(parts))))
        parts.append(index.invlists)
        index.own_invlists = False
        sizes = [_sizes(index, part) for part in parts]
        with written_whole(file) as stream:
            for number in range(index.nlist):
                for part, size in zip(parts, sizes, strict=True):
                    codes = _array(part.get_codes(number), int(size[number]) * index.code_size)
                    stream.write(codes.data)
                for part, size in zip(parts, sizes, strict=True):
                    stream.write(_array(part.get_ids(number), int(size[number])).data)
        lists = _on_disk(index, np.sum(sizes, axis=0), file)
    index.replace_invlists(lists, True)
    lists.this.disown()
    index.ntotal = start


def _fresh_lists(index: Any) -> None:
    """Give an index empty lists in memory. Its previous lists are not freed: the caller owns them."""
    fresh = import_faiss().ArrayInvertedLists(index.nlist, index.code_size)
    index.own_invlists = False
    index.replace_invlists(fresh, True)
    fresh.this.disown()
    index.ntotal = 0


def _moved_to(index: Any, file: Path) -> Any:
    """Write an index to a file and empty it; return the lists, mapped from the file."""
    faiss = import_faiss()
    write(index, file)
    index.reset()
    part = faiss.read_index(str(file), faiss.IO_FLAG_MMAP)
    part.own_invlists = False
    return part.invlists


def _sizes(index: Any, lists: Any) -> np.ndarray:
    """Return the number of vectors in each list."""
    return np.array([lists.list_size(number) for number in range(index.nlist)])


def _array(pointer: Any, length: int) -> np.ndarray:
    """Return the array of codes or IDs at a FAISS pointer, which is null for an empty list."""
    return import_faiss().rev_swig_ptr(pointer, length) if length else np.empty(0, np.uint8)


def _on_disk(index: Any, sizes: np.ndarray, file: Path) -> Any:
    """Describe a file to FAISS that contains the lists one after the other: the codes of a list, then its IDs."""
    faiss = import_faiss()
    lists = faiss.OnDiskInvertedLists(index.nlist, index.code_size, str(file))
    lists.read_only = True
    lists.lists.clear()
    offset = 0
    for size in sizes.tolist():
        one = faiss.OnDiskOneList()
        one.size = size
        one.capacity = size
        one.offset = offset
        lists.lists.push_back(one)
        offset += size * (index.code_size + ID_BYTES)
    lists.totsize = offset
    return lists


def read(file: Path, lists_file: Path) -> Any:
    """Read an index whose lists are in a file, which may have been moved since it was written.

    Raises:
        UserError: one of the files is damaged.
    """
    faiss = import_faiss()
    with readable(file):
        index = faiss.read_index(str(file), faiss.IO_FLAG_SKIP_IVF_DATA)
    lists = faiss.downcast_InvertedLists(getattr(index, "invlists", None))
    if not isinstance(lists, faiss.OnDiskInvertedLists) or not _fit(lists, lists_file):
        raise UserError(
            f"{lists_file} is damaged or does not belong to {file.name}: build the index again"
        )
    lists.filename = str(lists_file)
    lists.read_only = True
    with readable(lists_file):
        lists.do_mmap()
    return index


def _fit(lists: Any, file: Path) -> bool:
    """Check whether the lists fit a file exactly."""
    if not file.is_file() or file.stat().st_size != lists.totsize:
        return False
    for number in range(lists.lists.size()):
        one = lists.lists.at(number)
        end = one.offset + one.capacity * (lists.code_size + ID_BYTES)
        if one.size > one.capacity or (one.size and end > lists.totsize):
            return False
    return True
