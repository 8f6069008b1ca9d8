"""MACE models from files, without running code from them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from forcetune.backbones.mace.architecture import MaceArchitecture, check_sizes
from forcetune.backbones.mace.check import check_node
from forcetune.backbones.mace.content import (
    MaceContent,
    build_network,
    content_from_network,
    content_from_node,
    content_from_tensors,
)
from forcetune.backbones.mace.converted import check_not_converted
from forcetune.backbones.mace.module_spec import Node, node_from_module, node_from_record
from forcetune.backbones.mace.network import MaceNetwork
from forcetune.backbones.mace.traced_parts import traced_part
from forcetune.backbones.safe_unpickle.reader import Record, read_inert
from forcetune.errors import InputError, warn
from forcetune.kernels.tensors import UnfitError
from forcetune.utils.parsing import short

FORMAT = "forcetune-mace-1"
INDEX = ":index"
_UNPACKED = 64  # elements of a coupling tensor for each byte of a file that stores its nonzero ones


def read_content(path: str | os.PathLike[str]) -> MaceContent:
    """Read a model and check that forcetune computes all of it.

    Args:
        path: a ``.model`` file of mace-torch, or a ``.safetensors`` file of forcetune.

    Raises:
        InputError: the file is missing, damaged or no MACE model.
        UnfitError: it is one that forcetune does not compute; says what it is that it does not.
    """
    file = Path(path)
    if file.suffix == ".safetensors":
        return read_plain(file)
    return content_from_record(read_inert(file), file)


def content_from_record(record: Any, file: Path) -> MaceContent:
    """The content of a model that was read from a ``.model`` file; its tensors are views of what was read.

    Raises:
        InputError, UnfitError: as :func:`read_content`.
    """
    record = _uncompiled(record)
    _check_whole_model(record, file)
    check_not_converted(record, file)
    node = node_from_record(record, traced_part)
    content = _checked_content(node)
    plain = content.architecture
    # an attribute that mace before 0.3.15 did not have
    early = "use_edge_irreps_first" not in node.attributes
    if len(plain.heads) == 1 or plain.readout != "NonLinearBiasReadoutBlock" or not early:
        return content
    warn(
        f"{file} was made by mace 0.3.14, which mixed heads within readouts of this kind; energies are those of that "
        "version, and mace from 0.3.15 on computes others from the same file."
    )
    return replace(content, architecture=replace(plain, mixed_heads=len(plain.heads)))


def read_module(model: nn.Module) -> MaceContent:
    """The content of a module of mace in memory, which forcetune computes all of, or of a network of ours.

    An adapter that is attached to a network is left out.

    Raises:
        UnfitError: it is a model that forcetune does not compute.
    """
    model = getattr(model, "_orig_mod", model)  # of what torch.compile gives
    return content_from_network(model) if isinstance(model, MaceNetwork) else _checked_content(node_from_module(model))


def _checked_content(node: Node) -> MaceContent:
    content = content_from_node(node)
    check_sizes(content.architecture, sum(tensor.numel() for tensor in content.tensors.values()))
    check_node(node, build_network(content))
    return content


def _uncompiled(record: Any) -> Any:
    """The model inside of what ``torch.compile`` gives."""
    while isinstance(record, Record) and record.name == "OptimizedModule" and record.args:
        record = record.args[0]
    return record


def _check_whole_model(content: Any, file: Path) -> None:
    if isinstance(content, Record):
        return
    description = f"a {type(content).__name__}"
    if isinstance(content, dict):
        tensors = content and all(isinstance(value, Tensor) for value in content.values())
        description = "only the tensors of a model (a state dict)" if tensors else "a checkpoint or another table"
    raise InputError(
        f"{file} holds {description}; pass the whole model that mace wrote by torch.save(model), mostly *.model."
    )


def read_plain(path: str | os.PathLike[str]) -> MaceContent:
    """Read a model that forcetune wrote without pickle.

    Raises:
        InputError: the file is missing, damaged or something else.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{file} cannot be read (no such file); check the path.")
    try:
        with safe_open(file, framework="pt") as archive:
            header = archive.metadata() or {}
            if header.get("format") != FORMAT:
                raise InputError(
                    f"{file} is no MACE model of forcetune (format {header.get('format', 'unknown')}); pass a .model "
                    "file, or for an adapter its folder."
                )
            stored = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
        _unpack_sparse(stored, header, _UNPACKED * file.stat().st_size)
        architecture = MaceArchitecture.from_json(header["architecture"])
        trainable, constants = set(json.loads(header["parameters"])), set(json.loads(header["constants"]))
        tensors = {
            name: nn.Parameter(tensor) if name in trainable else tensor
            for name, tensor in stored.items()
            if name not in constants
        }
        legacy = header.get("couplings") != "all"
        if legacy:
            # what wrote these files computed skip connections with exact couplings, not with those that it stored
            stored = {name: tensor for name, tensor in stored.items() if ".skip_tp._compiled" not in name}
        couplings = {name: stored[name] for name in constants & stored.keys()}
        content = content_from_tensors(architecture, tensors, couplings)
        content = replace(content, rounded_charges=legacy or header.get("charges") == "float32")
        check_sizes(architecture, sum(tensor.numel() for tensor in stored.values()))
        build_network(content)
    except (SafetensorError, OSError, KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{file} is damaged or incomplete ({error}); get a fresh copy of the file.") from error
    except UnfitError as error:
        raise InputError(
            f"{file} cannot be rebuilt: {error}; write it again with this version of forcetune."
        ) from error
    return content


def _unpack_sparse(stored: dict[str, Tensor], header: Mapping[str, str], largest: int) -> None:
    """Tensors of which only what is not zero was written."""
    for name, shape in json.loads(header.get("sparse", "{}")).items():
        if math.prod(shape) > largest:
            raise ValueError(f"{name} has shape {short(shape)}")
        values, index = stored[name], stored.pop(name + INDEX).long()
        stored[name] = values.new_zeros(math.prod(shape)).index_put((index,), values).reshape(shape)
