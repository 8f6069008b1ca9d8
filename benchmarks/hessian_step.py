"""How far atoms should be displaced for Hessians by central differences of forces: the error against their derivative.

    python benchmarks/hessian_step.py [--model mini] [--frames 4] [--directions 3]

H z of random directions z for frames of the demo's molecule, from forces at x ± h z in float64 and in float32, beside
the derivative of the float64 model's forces by automatic differentiation.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import forcetune
from forcetune.evaluation import hessian
from forcetune.frames.frame import FloatArray, Frame
from forcetune.frames.read import read_frames
from forcetune.graphs.graph import build_graph

STEPS = {"float64": (1e-6, 1e-5, 1e-4, 1e-3), "float32": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}
"""Å."""


def differentiated(model: Any, frame: Frame) -> FloatArray:
    """The Hessian by automatic differentiation, (3 atoms, 3 atoms), eV/Å²."""
    graph = model.place(build_graph(frame, model.cutoff, model.dtype))
    graph = replace(graph, positions=graph.positions.requires_grad_())
    forces = model.predict(graph, create_graph=True).forces.reshape(-1)
    rows = [torch.autograd.grad(-force, graph.positions, retain_graph=True)[0].reshape(-1) for force in forces]
    return torch.stack(rows).double().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--directions", type=int, default=3)
    arguments = parser.parse_args()
    frames = read_frames(str(forcetune.demo_file("train"))).frames[: arguments.frames]
    models = {dtype: forcetune.load(arguments.model, dtype=dtype) for dtype in STEPS}
    products = [
        (frame, direction, exact @ direction.reshape(-1))
        for frame in frames
        for exact in [differentiated(models["float64"], frame)]
        for direction in np.random.default_rng(0).standard_normal((arguments.directions, len(frame), 3))
    ]
    largest = max(float(np.abs(product).max()) for _, _, product in products)
    print(f"{len(products)} products H z of {arguments.model}, entries up to {largest:.0f} eV/Å²\n")
    print("| precision | h, Å | largest error, eV/Å² | median of the largest |")
    print("|---|--:|--:|--:|")
    for dtype, steps in STEPS.items():
        for step in steps:
            hessian.STEPS[models[dtype].dtype] = step
            errors = []
            for frame, direction, product in products:
                ((_, predicted),) = hessian.hessian_products(models[dtype], [(frame, direction)])
                errors.append(float(np.abs(predicted.detach().numpy() - product).max()))
            print(f"| {dtype} | {step:g} | {max(errors):.2g} | {np.median(errors):.2g} |")


if __name__ == "__main__":
    main()
