"""What bpe:N learns from: a bounded sample spread over the train part, the same however the text is read."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat

import numpy as np

from plotarmour.data.chunks import read_chunks
from plotarmour.data.readers import HashingReader
from plotarmour.data.shards import Job, targets_of
from plotarmour.data.stories import story_hash

OVERHEAD = 200  # bytes of memory for each text, beside its characters


class Sample:
    """Texts whose hash lies below a threshold, which is halved whenever they exceed `n_bytes`.

    So the sample is spread evenly and depends on the set of texts, not on their order. Copies are counted.
    """

    def __init__(self, n_bytes: int):
        self.n_bytes, self.threshold, self.size = n_bytes, 2**64, 0
        self.rows: dict[str, list[int]] = {}  # text: mixed hash, bytes, copies

    def add(self, hashed: int, text: str, size: int, copies: int = 1) -> None:
        mixed = hashed * 0x9E3779B97F4A7C15 % 2**64  # the hash itself decides the part: its order is not independent
        if mixed >= self.threshold:
            return
        if text in self.rows:
            self.rows[text][2] += copies
            return
        self.rows[text] = [mixed, size, copies]
        self.size += size + OVERHEAD
        while self.size > self.n_bytes and len(self.rows) > 1:
            self.threshold //= 2
            below = {text: row for text, row in self.rows.items() if row[0] < self.threshold}
            self.rows = below or dict([min(self.rows.items(), key=lambda item: item[1][0])])
            self.size = sum(row[1] + OVERHEAD for row in self.rows.values())

    def texts(self) -> Iterator[str]:
        for text, (_, _, copies) in self.rows.items():
            yield from repeat(text, copies)


def sample_stories(job: Job, n_bytes: int) -> Iterator[str]:
    """Yield stories of the train part (of the whole text, without a split); long ones in pieces.

    Args:
        job: texts, split and excluded stories.
        n_bytes: UTF-8 bytes of the sample, at most.
    """
    sample, reading = Sample(n_bytes), replace(job.reading, in_pieces=True, hashed=True)
    for source in job.sources:
        pieces = Sample(n_bytes)  # of a long story, whose part is known at its end
        with HashingReader(source) as reader:
            for chunk in read_chunks(source, reader, reading):
                learned = targets_of(np.array(chunk.hashes or [], np.uint64), job) == 0
                if not chunk.piece:
                    for i in np.flatnonzero(learned):
                        sample.add(chunk.hashes[i], chunk.texts[i], chunk.sizes[i])
                    continue
                pieces.add(story_hash(chunk.texts[0]), chunk.texts[0], chunk.sizes[0])
                if chunk.piece == "last":
                    for text, (_, size, copies) in pieces.rows.items() if learned[0] else ():
                        sample.add(story_hash(text), text, size, copies)
                    pieces = Sample(n_bytes)
            reader.finish()
    yield from sample.texts()
