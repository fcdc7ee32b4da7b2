"""What bpe:N learns from: at most so many bytes, spread over the train part, the same however the text is read."""

from collections.abc import Iterator
from itertools import repeat

import numpy as np

from plotarmour.data.chunks import Reading, read_chunks
from plotarmour.data.readers import HashingReader, Source
from plotarmour.data.stories import part_of, story_hash

OVERHEAD = 200  # bytes of memory for each text held, whatever its length


class Sample:
    """Texts whose hash lies under a threshold, which is halved whenever they get too many.

    So the sample is spread evenly, and depends on the set of texts alone, not on their order. Copies are counted, not
    held.
    """

    def __init__(self, n_bytes: int):
        self.n_bytes, self.threshold, self.size = n_bytes, 2**64, 0
        self.kept: dict[str, list[int]] = {}  # text: mixed hash, bytes, copies

    def add(self, hashed: int, text: str, size: int, copies: int = 1) -> None:
        mixed = hashed * 0x9E3779B97F4A7C15 % 2**64  # the part hangs on the hash itself
        if mixed >= self.threshold:
            return
        if text in self.kept:
            self.kept[text][2] += copies
            return
        self.kept[text] = [mixed, size, copies]
        self.size += size + OVERHEAD
        while self.size > self.n_bytes and len(self.kept) > 1:
            self.threshold //= 2
            under = {text: row for text, row in self.kept.items() if row[0] < self.threshold}
            self.kept = under or dict([min(self.kept.items(), key=lambda item: item[1][0])])
            self.size = sum(row[1] + OVERHEAD for row in self.kept.values())

    def texts(self) -> Iterator[str]:
        for text, (_, _, copies) in self.kept.items():
            yield from repeat(text, copies)


def sample_stories(sources: list[Source], reading: Reading, shares: tuple[int, int, int] | None,
                   excluded: np.ndarray | None, n_bytes: int) -> Iterator[str]:
    """Return stories of the train part (of all, without a split), at most `n_bytes` of them; long ones in pieces.

    Args:
        sources: the texts.
        reading: how they are read.
        shares: of the split, or None.
        excluded: sorted uint64 hashes of stories to leave out, or None.
        n_bytes: UTF-8 bytes.
    """
    sample = Sample(n_bytes)
    wanted = Reading(reading.stories, reading.errors, True, True, reading.block)

    def learned(hashed: int) -> bool:
        if shares is not None and part_of(hashed, shares) != "train":
            return False
        if excluded is None or not len(excluded):
            return True
        return int(excluded[min(np.searchsorted(excluded, np.uint64(hashed)), len(excluded) - 1)]) != hashed

    for source in sources:
        pending = Sample(n_bytes)  # of a long story, whose part is known only at its end
        with HashingReader(source) as reader:
            for chunk in read_chunks(source, reader, wanted):
                if not chunk.piece:
                    for hashed, text, size in zip(chunk.hashes, chunk.texts, chunk.sizes, strict=True):
                        if learned(hashed):
                            sample.add(hashed, text, size)
                    continue
                pending.add(story_hash(chunk.texts[0]), chunk.texts[0], chunk.sizes[0])
                if chunk.piece == "last":
                    for text, (_, size, copies) in pending.kept.items() if learned(chunk.hashes[0]) else ():
                        sample.add(story_hash(text), text, size, copies)
                    pending = Sample(n_bytes)
            reader.finish()
    return sample.texts()
