"""Options of ``mace_run_train`` about the architecture: of a foundation model they are its own."""

from __future__ import annotations

from forcetune.cli.mace_train.option import MaceOption, mapped, network, refused

_BLOCK = "RealAgnostic{}InteractionBlock".format
_FIRST_BLOCKS = tuple(map(_BLOCK, ("Residual", "", "Density", "DensityResidual", "ResidualNonLinear")))
_BLOCKS = (_BLOCK("Residual"), _BLOCK("AttResidual"), *_FIRST_BLOCKS[1:])
_POLAR = "belongs to PolarMACE, which forcetune does not compute; leave it out"
_ADDED = "adds a part that the foundation model does not have; leave it out"

NETWORK_OPTIONS: tuple[MaceOption, ...] = (
    mapped(
        "--model",
        "text",
        "MACE",
        "`MACE` and `ScaleShiftMACE` both start from the foundation model as it is, as in mace; others are refused",
        choices=(
            *("BOTNet", "MACE", "ScaleShiftMACE", "PolarMACE", "MACELES", "ScaleShiftBOTNet", "AtomicDipolesMACE"),
            *("AtomicDielectricMACE", "EnergyDipolesMACE"),
        ),
    ),
    network("--r_max", "float", 5.0),
    network("--radial_type", "text", "bessel", ("bessel", "gaussian", "chebyshev")),
    network("--num_radial_basis", "int", 8),
    network("--num_cutoff_basis", "int", 5),
    network("--pair_repulsion", "set", False),
    network("--distance_transform", "text", "None", ("None", "Agnesi", "Soft")),
    network("--apply_cutoff", "bool", True),
    network("--use_last_readout_only", "bool", False),
    refused("--use_embedding_readout", "bool", False, _ADDED),
    network("--interaction", "text", _BLOCKS[0], _BLOCKS),
    network("--interaction_first", "text", _BLOCKS[0], _FIRST_BLOCKS),
    network("--max_ell", "int", 3),
    network("--correlation", "int", 3),
    network("--use_reduced_cg", "bool", False),
    network("--use_so3", "bool", False),
    network("--use_agnostic_product", "bool", False),
    network("--num_interactions", "int", 2),
    network("--MLP_irreps", "text", "16x0e"),
    network("--radial_MLP", "text", "[64, 64, 64]"),
    network("--hidden_irreps", "text", None),
    network("--edge_irreps", "text", None),
    network("--use_edge_irreps_first", "bool", False),
    network("--num_channels", "int", None),
    network("--max_L", "int", None),
    network("--gate", "text", "silu", ("silu", "tanh", "abs", "None")),
    network("--scaling", "text", "rms_forces_scaling", ("std_scaling", "rms_forces_scaling", "no_scaling")),
    network("--avg_num_neighbors", "float", 1),
    network("--compute_avg_num_neighbors", "bool", True),
    network("--mean", "float", None),
    network("--std", "float", None),
    refused("--les_arguments", "file", None, _ADDED),
    refused("--embedding_specs", "text", None, _ADDED),
    refused("--kspace_cutoff_factor", "float", 1.5, _POLAR),
    refused("--atomic_multipoles_max_l", "int", 0, _POLAR),
    refused("--atomic_multipoles_smearing_width", "float", 1.0, _POLAR),
    refused("--field_feature_max_l", "int", 0, _POLAR),
    refused("--field_feature_widths", "text", "[1.0]", _POLAR),
    refused("--field_feature_norms", "text", None, _POLAR),
    refused("--num_recursion_steps", "int", 1, _POLAR),
    refused("--field_si", "bool", False, _POLAR),
    refused("--include_electrostatic_self_interaction", "bool", False, _POLAR),
    refused("--add_local_electron_energy", "bool", False, _POLAR),
    refused("--quadrupole_feature_corrections", "bool", False, _POLAR),
    refused("--return_electrostatic_potentials", "bool", False, _POLAR),
    refused("--field_norm_factor", "float", 0.02, _POLAR),
    refused("--fixedpoint_update_config", "text", None, _POLAR),
    refused("--field_readout_config", "text", None, _POLAR),
)
