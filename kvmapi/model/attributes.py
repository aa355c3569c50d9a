"""Memory attributes per GFN: which pages the VMM declared private (KVM_SET_MEMORY_ATTRIBUTES).

One bit a page, kept as Roaring bitmaps over chunks of 2^24 pages (64 GiB). Chunks that are wholly private are bits of
one more bitmap and wholly shared ones are nowhere, so setting 64 GiB costs the same as setting a page, and an
attribute call over the whole address space (2^28 chunks) stays cheap. No memslot is needed for an attribute, as in
the kernel.
"""

from __future__ import annotations

from pyroaring import BitMap

_SHIFT = 24
_CHUNK = 1 << _SHIFT
_MASK = _CHUNK - 1
_NOT_PARTIAL = (0, _CHUNK)


class PrivateSet:
    """The set of private GFNs. A chunk is in `_whole`, or in `_partial` (neither empty nor full), or all shared."""

    def __init__(self) -> None:
        self._whole: BitMap = BitMap()
        self._partial: dict[int, BitMap] = {}

    def __contains__(self, gfn: int) -> bool:
        return self.has(gfn)

    def has(self, gfn: int) -> bool:
        """Is the page private? (`in` asks the same, and costs twice as much.)"""
        index = gfn >> _SHIFT
        chunk = self._partial.get(index)
        if chunk is not None:
            return (gfn & _MASK) in chunk
        return index in self._whole

    def set_range(self, gfn: int, pages: int, private: bool) -> bool:
        """Make [gfn, gfn+pages) private or shared; True when a page changed."""
        if pages == 1:
            return self.set_page(gfn, private)
        end = gfn + pages
        first, last = -(-gfn >> _SHIFT), end >> _SHIFT  # the chunks [first, last) are covered wholly
        if first > last:
            return self._set_in_chunk(last, gfn & _MASK, pages, private)
        changed = self._set_chunks(first, last, private)
        if gfn & _MASK:
            changed |= self._set_in_chunk(first - 1, gfn & _MASK, (first << _SHIFT) - gfn, private)
        if end & _MASK:
            changed |= self._set_in_chunk(last, 0, end & _MASK, private)
        return changed

    def set_page(self, gfn: int, private: bool) -> bool:
        """The same for one page: what a conversion after a fault asks for."""
        index, page = gfn >> _SHIFT, gfn & _MASK
        chunk = self._partial.get(index)
        if chunk is None:
            return self._set_in_chunk(index, page, 1, private)
        if (page in chunk) == private:
            return False
        (chunk.add if private else chunk.discard)(page)
        if len(chunk) in _NOT_PARTIAL:
            self._settle(index, chunk)
        return True

    def _settle(self, index: int, chunk: BitMap) -> None:
        """A chunk has become whole, or empty."""
        if chunk:
            self._whole.add(index)
        del self._partial[index]

    def _set_chunks(self, first: int, last: int, private: bool) -> bool:
        """Make the chunks [first, last) wholly private or wholly shared."""
        if first >= last:
            return False
        partial = [index for index in self._partial if first <= index < last]
        for index in partial:
            del self._partial[index]
        before = self._whole.range_cardinality(first, last)
        if private:
            self._whole.add_range(first, last)
            return bool(partial) or before != last - first
        self._whole.remove_range(first, last)
        return bool(partial) or before != 0

    def _set_in_chunk(self, index: int, first: int, count: int, private: bool) -> bool:
        """Make a part of one chunk private or shared."""
        chunk = self._partial.get(index)
        if chunk is None:
            whole = index in self._whole
            if whole == private:
                return False
            chunk = self._partial[index] = BitMap()
            if whole:
                chunk.add_range(0, _CHUNK)
                self._whole.discard(index)
        before = chunk.range_cardinality(first, first + count)
        if private:
            chunk.add_range(first, first + count)
        else:
            chunk.remove_range(first, first + count)
        if len(chunk) in _NOT_PARTIAL:
            self._settle(index, chunk)
        return bool(before != (count if private else 0))
