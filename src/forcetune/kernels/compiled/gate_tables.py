"""What the loops of gates are written for and called with: tables of numbers and addresses, sizes, forms."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

TILE = 16
"""Atoms that go through all steps together."""

PANEL = 2
"""Vectors of columns that a matrix product has in registers."""


class Slot(IntEnum):
    """Places in the table of a call; strides and sizes count numbers. Behind them stand addresses of blocks."""

    ENTRIES = 0  # blocks that are changed
    N_IN = 1
    RANK = 2
    COLUMNS = 3  # of all entries, each padded to whole vectors
    INPUT_PADDED = 4
    RANK_PADDED = 5
    COLUMNS_PADDED = 6
    ENTRY_TABLE = 7
    SCRATCH = 8
    DRIVER = 9  # h, (atoms, n_in)
    BEFORE = 10  # p, (atoms, rank padded); σ′(p) in layers with constant weights
    CHANGES = 11  # q, (atoms, columns padded); φ(q) of gains in layers with constant weights
    DOWN = 12  # (rank, n_in); bias, shift, bias, gain, bias follow
    TO_DOWN = 18  # 0 where no gradients by weights are wanted; the other five follow
    TO_DRIVER = 24  # 0 where it is not wanted
    MOVED_DRIVER = 25
    LAYER = 26  # of the functions for whole layers
    ZEROS = 27  # for them
    BLOCKS = 28  # first address of the first kind


class Blocks(IntEnum):
    """Kinds of blocks, (atoms, dim, channels) each; a call has the first ones."""

    Y = 0
    OUTER = 1  # what ``value`` writes, and the g that the others read
    TO_Y = 2
    TO_OUTER = 3
    MOVED_Y = 4


class Entry(IntEnum):
    """Places in the table of an entry, which is the same for all calls."""

    IS_GAIN = 0
    DIM = 1
    CHANNELS = 2
    PLACE = 3  # first column
    FIRST = 4  # first row of the weights of its kind, which are (rows, rank)


ENTRY_SLOTS = max(Entry) + 1


class Layer(IntEnum):
    """Places in the table of a layer with constant weights; rows of its products follow."""

    PRODUCTS = 0
    DOWN = 1  # D, (n_in, rank padded)
    UP = 2  # U, (rank, columns padded)
    DOWN_BACK = 3  # Dᵀ, (rank, n_in padded)
    UP_BACK = 4  # Uᵀ, (columns, rank padded)
    DOWN_BIAS = 5
    UP_BIAS = 6
    ROWS = 7


class Product(IntEnum):
    """Places in the row of a product y = x w; matrices lie panel by panel of columns.

    Behind the addresses of a call's blocks stand, for each product, those of x and y, or of the gradients by y and x.
    """

    DIM = 0
    FAN_IN = 1
    FAN_OUT = 2
    MATRIX = 3
    TRANSPOSED = 4
    ADDS = 5  # whether its gradient by x is added to what is there
    IN_TILE = 6  # whether its gradient by y is that of a tile of atoms alone


PRODUCT_SLOTS = max(Product) + 1


@dataclass(frozen=True, slots=True)
class Form:
    """What functions are written for.

    Attributes:
        activation: whether σ is a SiLU or the identity.
        gain: φ(x), ``exp`` or ``linear`` (1 + x).
        largest_exponent: beyond which ``exp`` goes on as its tangent.
    """

    activation: bool
    gain: str
    largest_exponent: float

    @property
    def by_result(self) -> bool:
        """Whether a layer has the gradient by its gains from its results: φ′ y is y φ for exponentials."""
        return self.gain == "exp"

    @property
    def name(self) -> str:
        return f"gate_{int(self.activation)}_{self.gain}_{self.largest_exponent!r}"


def padded(count: int, lanes: int) -> int:
    return -(-count // lanes) * lanes


def scratch_size(n_in: int, rank: int, columns: int, lanes: int) -> int:
    """Numbers of scratch memory for one thread."""
    wide = PANEL * lanes
    n, r, c = padded(n_in, wide), padded(rank, wide), padded(columns, wide)
    matrices = n_in * r + rank * c + rank * n + columns * r
    tiles = TILE * (2 * n + 7 * r + 3 * c + 1)
    # a product may read a panel beyond the last column
    return matrices + tiles + n + 2 * r + 2 * c + 2 * wide
