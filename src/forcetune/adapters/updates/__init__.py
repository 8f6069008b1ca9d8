"""The updates a method can make, one file each."""

from forcetune.adapters.updates.base import ActivationUpdate, Update, WeightUpdate
from forcetune.adapters.updates.bottleneck import Bottleneck
from forcetune.adapters.updates.dense import Dense, Frozen
from forcetune.adapters.updates.gain import Gain
from forcetune.adapters.updates.gate import Gate
from forcetune.adapters.updates.low_rank import LowRank
from forcetune.adapters.updates.shift import Shift
from forcetune.adapters.updates.soft_threshold import SoftThreshold

UPDATES: dict[str, type[Update]] = {
    update.name: update for update in (Gate, LowRank, SoftThreshold, Gain, Shift, Bottleneck, Dense, Frozen)
}

__all__ = [
    "UPDATES",
    "ActivationUpdate",
    "Bottleneck",
    "Dense",
    "Frozen",
    "Gain",
    "Gate",
    "LowRank",
    "Shift",
    "SoftThreshold",
    "Update",
    "WeightUpdate",
]
