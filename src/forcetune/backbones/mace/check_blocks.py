"""Whether the blocks that a file is made of are those of a network of ours."""

from __future__ import annotations

from torch import nn

from forcetune.backbones.mace.blocks import (
    Interaction,
    NonLinearInteraction,
    NonLinearReadout,
    Product,
    harmonics_text,
)
from forcetune.backbones.mace.compare import (
    compare_irreps,
    compare_value,
    find_module,
)
from forcetune.backbones.mace.module_spec import Node
from forcetune.backbones.mace.network import MaceNetwork
from forcetune.backbones.mace.traced_contraction import CODE, check_traced
from forcetune.kernels.symmetric_contraction import Contraction, SymmetricContraction
from forcetune.kernels.tensors import UnfitError


def check_interaction(node: Node, network: MaceNetwork, where: str) -> None:
    """An interaction's irreps are ours, and it was not made for an accelerator.

    Raises:
        UnfitError: it differs.
    """
    module = find_module(network, where, (Interaction, NonLinearInteraction))
    irreps = module.irreps
    expected = {
        "node_feats_irreps": irreps.features,
        "edge_irreps": irreps.edges,
        "edge_attrs_irreps": irreps.harmonics,
        "target_irreps": irreps.target,
        "irreps_out": irreps.target,
        "hidden_irreps": irreps.hidden,
        "node_attrs_irreps": f"{irreps.n_species}x0e",
        "edge_feats_irreps": f"{irreps.radial[0]}x0e",
    }
    if isinstance(module, NonLinearInteraction):
        expected["irreps_nonlin"] = module.equivariant_nonlin.irreps_in
    for name, text in expected.items():
        compare_irreps(node, name, text, where)
    _refuse_accelerators(node, where)


def _refuse_accelerators(node: Node, where: str) -> None:
    """Layers that were made for an accelerator keep their tensors in another order."""
    for name in ("cueq_config", "oeq_config"):
        config = node.attributes.get(name)
        state = getattr(config, "state", None) or getattr(config, "__dict__", None)
        if config is not None and (not isinstance(state, dict) or state.get("enabled", True)):
            raise UnfitError(f"{where} was made for an accelerator; convert it to e3nn by mace_cueq_to_e3nn first")


def check_product(node: Node, network: MaceNetwork, where: str) -> None:
    """A product has its skip connection or none, as ours, and was not made for an accelerator.

    Raises:
        UnfitError: it differs.
    """
    module = find_module(network, where, Product)
    compare_value(node, "use_sc", module.uses_skip, where)
    _refuse_accelerators(node, where)


def check_symmetric_contraction(node: Node, network: MaceNetwork, where: str) -> None:
    """A symmetric contraction's irreps are ours, and, where it is traced, so is its code.

    Raises:
        UnfitError: it differs.
    """
    module = find_module(network, where, SymmetricContraction)
    compare_irreps(node, "irreps_in", module.irreps_in, where)
    compare_irreps(node, "irreps_out", module.irreps_out, where)
    if CODE in node.attributes:
        plain = network.architecture
        check_traced(node, module, len(plain.atomic_numbers), plain.use_agnostic_product, where)


def check_contraction(node: Node, network: MaceNetwork, where: str) -> None:
    """A contraction's order and irreps are ours.

    Raises:
        UnfitError: it differs.
    """
    module = find_module(network, where, Contraction)
    compare_value(node, "correlation", module.order, where)
    compare_irreps(node, "coupling_irreps", module.irreps_in, where)


def check_readout(node: Node, network: MaceNetwork, where: str) -> None:
    """A non-linear readout's hidden irreps are ours.

    Raises:
        UnfitError: it differs.
    """
    module = find_module(network, where, NonLinearReadout)
    compare_irreps(node, "hidden_irreps", module.linear_1.irreps_out, where)


def check_harmonics(node: Node, network: MaceNetwork, where: str) -> None:
    """Spherical harmonics have our orders and normalization.

    Raises:
        UnfitError: it differs.
    """
    compare_irreps(node, "irreps_out", harmonics_text(network.architecture), where)
    compare_value(node, "normalize", True, where)
    compare_value(node, "normalization", "component", where)


def check_layer_norm(node: Node, network: MaceNetwork, where: str) -> None:
    """A layer norm has PyTorch's defaults, with which we compute it.

    Raises:
        UnfitError: it differs.
    """
    find_module(network, where, nn.LayerNorm)
    compare_value(node, "eps", 1e-5, where)
    compare_value(node, "elementwise_affine", True, where)
