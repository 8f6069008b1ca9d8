"""The architecture of a MACE model as plain values, read from either form of a model."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

from forcetune.backbones.mace.module_spec import Node, function_name, irreps_text, number
from forcetune.errors import InputError
from forcetune.kernels.tensors import UnfitError

GATES = ("silu", "tanh", "abs", "elu", "relu", "sigmoid", "gelu", "softplus")
_RADIAL = {"BesselBasis": "bessel", "GaussianBasis": "gaussian", "ChebychevBasis": "chebyshev"}
_RADIAL_SIZE = {"bessel": "bessel_weights", "gaussian": "gaussian_weights", "chebyshev": "n"}
_TRANSFORMS = {"AgnesiTransform": "Agnesi", "SoftTransform": "Soft"}
READOUTS = ("NonLinearReadoutBlock", "NonLinearBiasReadoutBlock")


@dataclass(frozen=True, slots=True)
class MaceArchitecture:
    """All that mace's constructor and forward pass need besides parameters and buffers.

    Attributes:
        kind: ``MACE`` or ``ScaleShiftMACE``.
        r_max: cutoff, Å.
        num_bessel: radial basis functions.
        num_polynomial_cutoff: p of the envelope.
        max_ell: highest order of the spherical harmonics.
        interactions: class of each interaction block, first to last.
        atomic_numbers: element table, in the model's order.
        hidden_irreps, MLP_irreps: node features; hidden layer of the last readout, for one head.
        avg_num_neighbors: of each interaction block.
        correlation: order of each product block.
        gate: activation of the last readout, or None.
        radial_type: ``bessel``, ``gaussian`` or ``chebyshev``.
        distance_transform: ``None``, ``Agnesi`` or ``Soft``.
        readout: class of the last readout.
        mixed_heads: heads whose hidden features all enter the middle layer of the last readout. mace 0.3.14 masked
            those of other heads behind that layer only, later versions before it, too (1).
        constants: normalisations computed numerically when the model was made, by dotted name.
    """

    kind: str
    r_max: float
    num_bessel: int
    num_polynomial_cutoff: float
    max_ell: int
    interactions: tuple[str, ...]
    atomic_numbers: tuple[int, ...]
    hidden_irreps: str
    MLP_irreps: str
    avg_num_neighbors: tuple[float, ...]
    correlation: tuple[int, ...]
    gate: str | None
    heads: tuple[str, ...] = ("Default",)
    pair_repulsion: bool = False
    distance_transform: str = "None"
    radial_type: str = "bessel"
    radial_MLP: tuple[int, ...] = (64, 64, 64)
    apply_cutoff: bool = True
    use_reduced_cg: bool = False
    use_so3: bool = False
    use_agnostic_product: bool = False
    use_last_readout_only: bool = False
    edge_irreps: str | None = None
    use_edge_irreps_first: bool = False
    keep_last_layer_irreps: bool = False
    readout: str = "NonLinearReadoutBlock"
    mixed_heads: int = 1
    constants: tuple[tuple[str, float], ...] = ()

    def to_json(self) -> str:
        """One line with sorted keys; equal architectures give equal text."""
        table = asdict(self)
        if self.mixed_heads == 1:
            del table["mixed_heads"]  # part of fingerprints that are older than it
        return json.dumps(table, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> MaceArchitecture:
        """Read what :meth:`to_json` wrote.

        Raises:
            InputError: it is not that.
        """
        try:
            table = json.loads(text)
            unknown = set(table) - {entry.name for entry in fields(cls)}
            if unknown:
                raise ValueError(f"unknown keys {', '.join(sorted(unknown))}")
            table = {name: tuple(v) if isinstance(v, list) else v for name, v in table.items()}
            table["constants"] = tuple((str(k), float(v)) for k, v in table.get("constants", ()))
            return cls(**table)
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"the description of a MACE model cannot be read ({error}); it was written by another version of "
                "forcetune: write it again with this one."
            ) from error


def read_architecture(root: Node) -> MaceArchitecture:
    """The architecture of a model in either form.

    Raises:
        UnfitError: it has parts that this package does not rebuild.
    """
    _check_supported(root)
    interactions = _members(root, "interactions")
    heads = tuple(str(head) for head in root.attributes.get("heads") or ("Default",))
    radial = root.child("radial_embedding")
    basis = radial.child("bessel_fn")
    if basis.kind not in _RADIAL:
        raise UnfitError(f"its radial basis is a {basis.kind}")
    radial_type = _RADIAL[basis.kind]
    harmonics = irreps_text(interactions[0].attributes.get("edge_attrs_irreps")).split("+")
    hidden = interactions[min(1, len(interactions) - 1)]
    hidden_irreps = irreps_text(hidden.attributes["node_feats_irreps" if len(interactions) > 1 else "hidden_irreps"])
    last = irreps_text(interactions[-1].attributes["hidden_irreps"])
    edge_irreps = root.attributes.get("edge_irreps")
    return MaceArchitecture(
        kind=root.kind,
        r_max=number(root.tensor("r_max"), "cutoff"),
        num_bessel=basis.tensor(_RADIAL_SIZE[radial_type]).numel(),
        num_polynomial_cutoff=number(radial.child("cutoff_fn").tensor("p"), "envelope"),
        max_ell=max(int(part.split("x")[1][:-1]) for part in harmonics),
        interactions=tuple(block.kind for block in interactions),
        atomic_numbers=tuple(int(z) for z in root.tensor("atomic_numbers").flatten()),
        hidden_irreps=hidden_irreps,
        avg_num_neighbors=tuple(
            number(
                block.attributes.get("avg_num_neighbors", block.tensors.get("avg_num_neighbors")), "avg_num_neighbors"
            )
            for block in interactions
        ),
        correlation=tuple(_correlation(product) for product in _members(root, "products")),
        heads=heads,
        pair_repulsion=root.children.get("pair_repulsion_fn") is not None,
        distance_transform=_transform(radial),
        radial_type=radial_type,
        radial_MLP=_radial_widths(interactions[0].child("conv_tp_weights")),
        apply_cutoff=bool(radial.attributes.get("apply_cutoff", True)),
        use_reduced_cg=bool(root.attributes.get("use_reduced_cg", False)),
        use_so3=any(part.endswith("e") and int(part.split("x")[1][:-1]) % 2 for part in harmonics),
        use_agnostic_product=bool(root.child("products.0").attributes.get("use_agnostic_product", False)),
        use_last_readout_only=len(_members(root, "readouts")) < len(interactions),
        edge_irreps=None if edge_irreps is None else irreps_text(edge_irreps),
        use_edge_irreps_first=bool(root.attributes.get("use_edge_irreps_first", False)),
        keep_last_layer_irreps=len(interactions) > 1 and "+" in hidden_irreps and last == hidden_irreps,
        constants=_constants(root),
        **_readout(root, len(heads)),
    )


def _check_supported(root: Node) -> None:
    if root.kind not in ("MACE", "ScaleShiftMACE") or root.package != "mace":
        raise UnfitError(f"it is a {root.kind}, not a MACE or ScaleShiftMACE")
    for name in ("joint_embedding", "embedding_readout"):
        if name in root.children:
            raise UnfitError(f"it embeds further inputs such as charge or spin ({name})")
    for prefix, node in root.walk():
        if node.package not in ("mace", "e3nn", "torch"):
            raise UnfitError(
                f"its part {prefix.rstrip('.')} is of {node.package}; convert it to e3nn by mace's tools first"
            )
        for name in ("cueq_config", "oeq_config"):
            config = node.attributes.get(name)
            state = getattr(config, "state", None) or getattr(config, "__dict__", None)
            if config is not None and (not isinstance(state, dict) or state.get("enabled", True)):
                raise UnfitError("it was made for an accelerator; convert it to e3nn by mace_cueq_to_e3nn first")


def _members(root: Node, name: str) -> list[Node]:
    """The modules of a module list."""
    children = list(root.child(name).children.values())
    members = [member for member in children if member is not None]
    if not members or len(members) != len(children):
        raise UnfitError(f"its {name} are empty")
    return members


def _correlation(product: Node) -> int:
    contractions = _members(product.child("symmetric_contractions"), "contractions")
    orders = {len(contraction.child("weights").tensors) + 1 for contraction in contractions}
    if len(orders) != 1:
        raise UnfitError("its contractions have different orders within one layer")
    return orders.pop()


def _transform(radial: Node) -> str:
    transform = radial.children.get("distance_transform")
    if transform is None:
        return "None"
    if transform.kind not in _TRANSFORMS:
        raise UnfitError(f"its distance transform is a {transform.kind}")
    return _TRANSFORMS[transform.kind]


def _radial_widths(net: Node) -> tuple[int, ...]:
    """Widths of the hidden layers of a radial MLP, of either kind."""
    if net.kind == "FullyConnectedNet":
        layers = [child.tensor("weight").shape[1] for child in net.children.values() if child is not None]
    else:
        parts = net.child("net").children.values()
        layers = [child.tensor("weight").shape[0] for child in parts if child is not None and child.kind == "Linear"]
    return tuple(int(width) for width in layers[:-1])


def _readout(root: Node, heads: int) -> dict[str, Any]:
    """Class, gate and hidden irreps of the last readout; a linear one, of models with one layer, has neither."""
    last = _members(root, "readouts")[-1]
    if last.kind == "LinearReadoutBlock" and len(_members(root, "interactions")) == 1:
        return {"MLP_irreps": "1x0e", "gate": None, "readout": READOUTS[0]}
    if last.kind not in READOUTS:
        raise UnfitError(f"its last readout is a {last.kind}")
    hidden = irreps_text(last.attributes.get("hidden_irreps"))
    multiplicity, _, irrep = hidden.partition("x")
    if heads > 1:
        if "+" in hidden or int(multiplicity) % heads:
            raise UnfitError(f"its last readout has {hidden} hidden features for {heads} heads")
        hidden = f"{int(multiplicity) // heads}x{irrep}"
    activation = last.child("non_linearity.acts").children.get("0")
    gate = None if activation is None else function_name(activation.attributes.get("f"))
    if gate is not None and gate not in GATES:
        raise UnfitError(f"its gate is {gate}, which is none of {', '.join(GATES)}")
    return {"MLP_irreps": hidden, "gate": gate, "readout": last.kind}


def _constants(root: Node) -> tuple[tuple[str, float], ...]:
    constants = (
        (f"{prefix}{name}", number(node.attributes[name], name))
        for prefix, node in root.walk()
        for name in ("cst", "coeff")
        if name in node.attributes
    )
    return tuple(sorted(constants))


def check_sizes(plain: MaceArchitecture, elements: int) -> None:
    """Refuse layers that are larger than all tensors of a file together: they would exhaust memory.

    Args:
        plain: an architecture.
        elements: of all tensors of the file.

    Raises:
        UnfitError: there are such layers, or sizes or names that make no sense.
    """
    check_sane(plain)
    parts = [part.partition("x") for part in plain.hidden_irreps.split("+")]
    channels = max(int(count) for count, _, _ in parts)
    widths = (plain.num_bessel, *plain.radial_MLP)
    # every block joins channels of the same kind with each other; the species join them in at least one
    needed = max(channels**2, len(plain.atomic_numbers) * channels, *map(math.prod, pairwise(widths)))
    if needed > max(elements, 1 << 16) or len(widths) > 32:
        raise UnfitError(f"its architecture does not fit its tensors ({needed:,} weights of {elements:,})")


def check_sane(plain: MaceArchitecture) -> None:
    """Refuse what would exhaust time or memory before the tensors are compared, and names that are no choices.

    Raises:
        UnfitError: there is such a number or name.
    """
    try:
        for irreps in (plain.hidden_irreps, plain.MLP_irreps, plain.edge_irreps or "1x0e"):
            parts = [part.partition("x") for part in irreps.split("+")]
            if sum(int(count) for count, _, _ in parts) > 16384 or any(int(irrep[:-1]) > 12 for _, _, irrep in parts):
                raise UnfitError(f"its architecture makes no sense (irreps {irreps})")
        layers = len(plain.interactions)
        sane = (
            plain.kind in ("MACE", "ScaleShiftMACE")
            and plain.readout in READOUTS
            and (plain.gate is None or plain.gate in GATES)
            and 0 < plain.r_max < 100
            and 0 < plain.num_bessel <= 1024
            and 0 <= plain.max_ell <= 8
            and 0 < layers <= 16
            and layers == len(plain.correlation) == len(plain.avg_num_neighbors)
            and len(set(plain.interactions[1:])) <= 1
            and all(0 < order <= 5 for order in plain.correlation)
            and 0 < len(plain.heads) <= 1024
            and 0 < plain.mixed_heads <= (1024 if plain.readout == "NonLinearBiasReadoutBlock" else 1)
            and (plain.mixed_heads == 1 or len(plain.heads) in (1, plain.mixed_heads))
            and all(0 < width <= 16384 for width in plain.radial_MLP)
            and len(set(plain.atomic_numbers)) == len(plain.atomic_numbers) > 0
            and all(0 < z < 119 for z in plain.atomic_numbers)
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise UnfitError(f"its architecture makes no sense ({error})") from error
    if not sane:
        raise UnfitError("its architecture makes no sense (a size or name is out of any range in use)")
