"""Random numbers that are a function of what they are for and of some numbers (seed, epoch, row, ...), of nothing else.

Every purpose has its name in a table here, and no name is given twice: `Purpose` for streams of bits (rows, views,
initial weights), `RowDraw` for single integers and for hashes of rows (k-means, k-NN, sampled classes).
"""

from __future__ import annotations

import hashlib
from enum import Enum, unique

import numpy as np
from numpy.typing import NDArray

_WORD = 2**32


@unique
class Purpose(Enum):
    """What a stream of bits is for; the values are hashed, so another one draws other numbers."""

    VIEW = "view"  # seed, epoch, row, view
    SHARD_ORDER = "order of shards"  # seed, epoch
    WINDOW_ORDER = "order in a window"  # seed, epoch, stream, window
    SOME_SHARDS = "some shards"  # seed
    # of a data set that becomes shards: the seed of make_shards; the demo's has none, which is the stream of seed 0.
    # Two data sets of one length are then shuffled alike, which joins nothing of them.
    DATA_SET_ORDER = "order of a collection"
    ENCODED_SIZES = "sizes of re-encoded images"  # none: the same places of every task
    NEIGHBOUR = "neighbour"  # seed, epoch, row
    TURN = "near-duplicate that is shown"  # seed, epoch, row of the first of its group
    ADAPTORS = "adaptors"  # seed, K: start of a set, then of its classifier
    CLASSES = "classes"  # seed, K: the seed of the draw of classes below
    RANDOM_ADAPTORS = "random adaptors"  # seed, set
    FUSION = "fusion"  # seed; one start for the fusion with and without labels, so that these can be compared
    MEASURED_ADAPTORS = "rates"  # set: weights of a model whose speed is measured
    # seed, or seed, task, or seed, task, 1 or 2. One stream draws the view queries and the rows that they are searched
    # among; which queries are among these rows is correlated, and no matter: all are added to them.
    EVALUATION_SAMPLE = "evaluation sample"
    VALIDATION_HALF = "validation half"  # none: runs of other seeds have the same queries in it
    GALLERY = "gallery"  # seed, task
    NESTED_ROWS = "rows of nestedness"  # seed
    NESTED_BY_CHANCE = "nestedness by chance"  # seed, K, next K
    SHOWN_CLUSTERS = "sample clusters"  # seed, K
    INDEX_SAMPLE = "rows of a search index"  # lists: rows that train them; none: rows that measure the recall
    CLUSTER_IMAGES = "images of a cluster"  # seed, K, cluster
    MAP = "map of embeddings"  # images: which are shown of many; images, 1: which have pictures


def philox(purpose: Purpose, *numbers: int) -> np.random.Philox:
    """The bit stream of a purpose and its numbers, each in 0 .. 2**64 - 1.

    Each number takes two words: numpy pads short entropy with zeros, so lists of unlike lengths could otherwise meet.
    One pair still does: no number at all, and 0.
    """
    for number in numbers:
        if not 0 <= number < _WORD**2:
            raise ValueError(f"{purpose.value}: seeds and row ids must lie in 0 .. 2**64 - 1, got {number}")
    words = [word for number in numbers for word in (int(number) % _WORD, int(number) // _WORD)]
    tag = int.from_bytes(hashlib.sha256(purpose.value.encode()).digest()[:4], "little")
    return np.random.Philox(np.random.SeedSequence([tag, *words]))


def generator(purpose: Purpose, *numbers: int) -> np.random.Generator:
    """A generator on the bit stream of a purpose and its numbers."""
    return np.random.Generator(philox(purpose, *numbers))


def view_generator(seed: int, epoch: int, row: int, view: int) -> np.random.Generator:
    """The generator of one augmented view: a function of these four, never of a worker."""
    return generator(Purpose.VIEW, seed, epoch, row, view)


def torch_seed(purpose: Purpose, *numbers: int) -> int:
    """A seed for a torch.Generator, in 0 .. 2**62 - 1."""
    return int(generator(purpose, *numbers).integers(2**62))


def permutation(length: int, purpose: Purpose, *numbers: int) -> NDArray[np.int64]:
    """A shuffle of 0 .. length - 1, (length,).

    Sorted from raw bits, which stay the same in any version of numpy; Generator.permutation does not promise that.
    """
    return np.argsort(philox(purpose, *numbers).random_raw(length), kind="stable")


@unique
class RowDraw(Enum):
    """What a single integer, or a hash of each row, is drawn for: the form of its key.

    A form has a number in each place that is always the same, and a name in each that the caller fills. Keys of two
    forms of one length can be equal; tests/data/test_rng.py lists all such pairs. Are these correlated draws?

    - An integer and hashes of rows: no. (seed, K, 1) is candidate 1 of k-means++ and the sample of `sampled`; (seed, K,
      6, 1) is the test of candidate 6 and the second round of k-means||. The digest is taken modulo a sum of weights in
      one and mixed with the places of rows in the other; the test finds what they draw uncorrelated.
    - Hashes of rows, twice: yes, and harmless. The id 6 is used twice: (seed, 10, 6, 6) is a round of k-means|| for K =
      10 and the recall sample of 10 neighbours in epoch 6. Their keys are equal in that epoch alone, where K and the
      number of neighbours both are 9 or both 10. About 5 of the 1024 rows that measure recall may then be rows that
      began another clustering, which the search does not use. The id 2 of `hierarchical` is alike: in epoch 2.

    Forms that cannot meet would change the labels of every run.
    """

    CANDIDATE = ("seed", "K", "candidate")  # of k-means++: where among the D^2 weights
    CANDIDATE_TEST = ("seed", "K", "candidate", 1)  # whether it is accepted
    OVERSAMPLED = ("seed", "K", 6, "rows so far")  # rows of a round of k-means||
    RESTART = ("seed", "restart", 0)  # its seed
    FIT_SAMPLE = ("seed", "K", 1)  # rows to which `sampled` fits centroids
    HIERARCHICAL_START = ("seed", "K", 2, "round")  # first centroids within the coarse clusters of `hierarchical`
    AGREEMENT = ("seed", "K", 3)  # rows whose approximate labels are compared with the exact ones
    KNN_FIT_SAMPLE = ("seed", "lists", 5)  # rows to which the centroids of inverted lists are fitted
    KNN_RECALL = ("seed", "k", "epoch", 6)  # rows that measure recall
    CLASSES = ("seed", "step")  # classes that take part in a step of the sampled softmax

    def key(self, *numbers: int) -> tuple[int, ...]:
        """The numbers in the places of the names."""
        left = iter(numbers)
        found = tuple(part if isinstance(part, int) else int(next(left)) for part in self.value)
        assert next(left, None) is None, f"{self.name} takes {self.value}, got {numbers}"
        return found


def draw(limit: int, *key: int) -> int:
    """An integer in [0, limit), a function of the key alone: no generator, so no state and no library version."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=24).digest()
    return int.from_bytes(digest, "big") % limit


def stream(*identity: object) -> np.random.Generator:
    """The generator of an image of the demo data set: a pure function of what identifies it, in every process."""
    digest = hashlib.sha256("/".join(map(str, identity)).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype="<u4").astype(np.uint64))
