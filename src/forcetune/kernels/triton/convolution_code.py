"""Text of Triton kernels for the convolution of :mod:`forcetune.kernels.convolution`, for one tensor product each.

The convolution is trilinear in radial weights R, coupled harmonics T and features x, so that its value and its
derivatives are four sums, each with one factor left out and summed over what that factor does not depend on:

    out_p[i, k, c] = Σ_{e → i} R_p[e, c] Σ_m T_p[e, m, k] x[j, m, c]
    x̄[j, m, c]     = Σ_{e from j} Σ_p R_p[e, c] Σ_k T_p[e, m, k] g_p[i, k, c]
    R̄_p[q, c]      = Σ_{e of q} Σ_{m, k} T_p[e, m, k] x[j, m, c] g_p[i, k, c]
    T̄_p[q, m, k]   = Σ_{e of q} ± Σ_c R_p[q, c] x[j, m, c] g_p[i, k, c]

for edges e = (j → i) of pairs q. Second derivatives are the same sums of products in which, in turn, each of R, T and x
is replaced by a direction. Nothing is written for an edge, and no two programs add to one number: results do not depend
on their order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from forcetune.kernels.convolution import Path

MOST_SUMS = 24
"""Components of outputs that one program sums, for each channel; more would not fit into a GPU's registers."""

Flags = tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Member:
    """A path, and where its numbers begin.

    Attributes:
        path: the path.
        radial, angular: first column among the radial weights, and among the coupled harmonics.
        width: channels of its output, those of other paths included.
    """

    path: Path
    radial: int
    angular: int
    width: int


@dataclass(frozen=True, slots=True)
class Shape:
    """What a kernel is generated for.

    Attributes:
        members: paths of one number of channels.
        radial_width, angular_width: columns of R and T of all paths of the tensor product.
        moved: None for the sum itself; otherwise whether there are directions of R, of T, and of the features of each
            source.
    """

    members: tuple[Member, ...]
    radial_width: int
    angular_width: int
    moved: Flags | None

    @property
    def channels(self) -> int:
        return self.members[0].path.channels

    @property
    def sources(self) -> dict[int, int]:
        """Components of the features of each source."""
        return {member.path.source: member.path.dim_in for member in self.members}

    def moves(self, member: Member) -> tuple[bool, bool, bool]:
        """Whether there is a direction of R, T and x of a path."""
        if self.moved is None:
            return False, False, False
        return self.moved[0], self.moved[1], self.moved[2 + member.path.source]


def list_members(paths: Sequence[Path], widths: Sequence[int]) -> list[Member]:
    """All paths of a tensor product; ``widths`` are the channels of its outputs."""
    radial = itertools.accumulate((path.channels for path in paths), initial=0)
    angular = itertools.accumulate((path.dim_in * path.dim_out for path in paths), initial=0)
    return [Member(path, r, t, widths[path.group]) for path, r, t in zip(paths, radial, angular, strict=False)]


def group_members(members: Sequence[Member]) -> list[tuple[Member, ...]]:
    """Paths that one kernel computes: of one number of channels, and of :data:`MOST_SUMS` components or fewer."""
    groups: list[list[Member]] = []
    for channels in dict.fromkeys(member.path.channels for member in members):
        sums = MOST_SUMS + 1
        for member in members:
            if member.path.channels != channels:
                continue
            if sums + member.path.dim_out > MOST_SUMS:
                groups.append([])
                sums = 0
            groups[-1].append(member)
            sums += member.path.dim_out
    return [tuple(group) for group in groups]


# ---- pieces ----------------------------------------------------------------------------------------------------------


def _header(name: str, arguments: Sequence[str], constants: Sequence[str], unspecialised: str = "") -> list[str]:
    decorator = f"@triton.jit(do_not_specialize=[{unspecialised!r}])" if unspecialised else "@triton.jit"
    listed = ", ".join([*arguments, *(f"{constant}: tl.constexpr" for constant in constants)])
    return [decorator, f"def {name}({listed}):"]


def _moved_arguments(shape: Shape) -> list[str]:
    if shape.moved is None:
        return []
    names = ["h_radial", "h_angular", *(f"h_x{number}" for number in range(len(shape.moved) - 2))]
    return [name for name, there in zip(names, shape.moved, strict=True) if there and _is_used(shape, name)]


def _is_used(shape: Shape, name: str) -> bool:
    return not name.startswith("h_x") or int(name.removeprefix("h_x")) in shape.sources


def _channels(shape: Shape) -> Iterator[str]:
    yield "    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)"
    yield f"    inside = c < {shape.channels}"


def _features(name: str, label: str, source: int, dim: int, channels: int, row: str) -> Iterator[str]:
    """Loads of all components of the features of a source."""
    yield f"        p = {name}{source} + {row} * {dim * channels} + c"
    for m in range(dim):
        yield f"        {label}{source}_{m} = tl.load(p + {m * channels}, mask=inside, other=0.0)"


def _outer(member: Member, number: int, row: str) -> Iterator[str]:
    """Loads of all components of a gradient by the output of a path."""
    path = member.path
    yield f"        p = g{path.group} + {row} * {path.dim_out * member.width} + c"
    for k in range(path.dim_out):
        place = k * member.width + path.column
        yield f"        g{number}_{k} = tl.load(p + {place}, mask=inside, other=0.0)"


def _weights(shape: Shape, member: Member, directions: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Loads of R, with the sign of T in it: every product has the one or its direction as a factor, or T's."""
    for label, name in directions:
        load = f"tl.load({name} + pair * {shape.radial_width} + {member.radial} + c, mask=inside, other=0.0)"
        yield f"        {label} = {f'sign * {load}' if member.path.odd else load}"


def _angle(member: Member, m: int, k: int, row: str = "t") -> str:
    """A number of T, of the rows that :func:`_angular_rows` begin."""
    return f"tl.load({row} + {member.angular + m * member.path.dim_out + k})"


def _angular_rows(shape: Shape) -> Iterator[str]:
    yield f"        t = angular + pair * {shape.angular_width}"
    if shape.moved is not None and shape.moved[1]:
        yield f"        ht = h_angular + pair * {shape.angular_width}"


def _radial_loads(shape: Shape, member: Member) -> Iterator[str]:
    by_radial, by_angular, by_features = shape.moves(member)
    needed: list[tuple[str, str]] = []
    if shape.moved is None or by_angular or by_features:
        needed.append(("r", "radial"))
    if by_radial:
        needed.append(("hr", "h_radial"))
    yield from _weights(shape, member, needed)


def _rows(shape: Shape, kind: str) -> Iterator[str]:
    """The beginning of a sum over the edges of an atom."""
    yield "    atom = tl.program_id(0).to(tl.int64)"
    yield from _channels(shape)
    yield f"    kind = {kind}.dtype.element_ty"
    yield "    first = tl.load(starts + atom)"
    yield "    last = tl.load(starts + atom + 1)"


_EDGE = (
    "    for row in range(first, last):",
    "        pair = tl.load(edges + 3 * row)",
    "        other = tl.load(edges + 3 * row + 1)",
    "        sign = tl.load(edges + 3 * row + 2).to(kind)",
)


# ---- the four sums ---------------------------------------------------------------------------------------------------


def write_gather(shape: Shape) -> str:
    """The sum at receivers: ``gather(starts, edges, radial, angular, x…, h…, out…)``, ``edges`` with their senders."""
    groups = dict.fromkeys(member.path.group for member in shape.members)
    arguments = ["starts", "edges", "radial", "angular", *(f"x{source}" for source in shape.sources)]
    arguments += [*_moved_arguments(shape), *(f"out{group}" for group in groups)]
    lines = [*_header("gather", arguments, ["BLOCK"]), *_rows(shape, "radial")]
    for number, member in enumerate(shape.members):
        lines += [f"    s{number}_{k} = tl.zeros((BLOCK,), kind)" for k in range(member.path.dim_out)]
    lines += [*_EDGE, *_angular_rows(shape)]
    for source, dim in shape.sources.items():
        lines += _features("x", "x", source, dim, shape.channels, "other")
        if shape.moved is not None and shape.moved[2 + source]:
            lines += _features("h_x", "hx", source, dim, shape.channels, "other")
    for number, member in enumerate(shape.members):
        lines += _gather_path(shape, number, member)
    for number, member in enumerate(shape.members):
        path = member.path
        for k in range(path.dim_out):
            place = f"out{path.group} + (atom * {path.dim_out} + {k}) * {member.width} + {path.column} + c"
            lines.append(f"    tl.store({place}, s{number}_{k}, mask=inside)")
    return "\n".join(lines) + "\n"


def _gather_path(shape: Shape, number: int, member: Member) -> Iterator[str]:
    path = member.path
    by_radial, by_angular, by_features = shape.moves(member)
    yield from _radial_loads(shape, member)
    for m in range(path.dim_in):
        x, hx = f"x{path.source}_{m}", f"hx{path.source}_{m}"
        if shape.moved is None:
            yield f"        v = r * {x}"
        elif by_radial or by_features:
            parts = [f"hr * {x}"] * by_radial + [f"r * {hx}"] * by_features
            yield f"        v = {' + '.join(parts)}"
        if by_angular:
            yield f"        u = r * {x}"
        for k in range(path.dim_out):
            if shape.moved is None or by_radial or by_features:
                yield f"        s{number}_{k} += {_angle(member, m, k)} * v"
            if by_angular:
                yield f"        s{number}_{k} += {_angle(member, m, k, 'ht')} * u"


def write_collect(shape: Shape) -> str:
    """The sum at senders, of paths from one source: ``collect(starts, edges, radial, angular, g…, h…, to_x)``.

    ``edges`` are those of each sender, with their receivers.
    """
    groups = dict.fromkeys(member.path.group for member in shape.members)
    ((_, dim),) = shape.sources.items()
    moved = [name for name in _moved_arguments(shape) if not name.startswith("h_x")]
    arguments = ["starts", "edges", "radial", "angular", *(f"g{group}" for group in groups), *moved, "to_x"]
    lines = [*_header("collect", arguments, ["BLOCK"]), *_rows(shape, "radial")]
    lines += [f"    s{m} = tl.zeros((BLOCK,), kind)" for m in range(dim)]
    lines += [*_EDGE, *_angular_rows(shape)]
    for number, member in enumerate(shape.members):
        by_radial, by_angular, _ = shape.moves(member)
        if shape.moved is not None and not (by_radial or by_angular):
            continue
        lines += [*_outer(member, number, "other"), *_radial_loads(shape, member)]
        for k in range(member.path.dim_out):
            if shape.moved is None or by_radial:
                lines.append(f"        v = {'r' if shape.moved is None else 'hr'} * g{number}_{k}")
            if by_angular:
                lines.append(f"        u = r * g{number}_{k}")
            for m in range(dim):
                if shape.moved is None or by_radial:
                    lines.append(f"        s{m} += {_angle(member, m, k)} * v")
                if by_angular:
                    lines.append(f"        s{m} += {_angle(member, m, k, 'ht')} * u")
    lines += [
        f"    tl.store(to_x + (atom * {dim} + {m}) * {shape.channels} + c, s{m}, mask=inside)" for m in range(dim)
    ]
    return "\n".join(lines) + "\n"


_ENDS = (
    "    count = tl.load(directions + pair)",
    "    first = tl.load(senders + pair)",
    "    last = tl.load(receivers + pair)",
)


def write_to_radial(shape: Shape) -> str:
    """Gradients by R: ``to_radial(directions, senders, receivers, angular, x…, g…, h…, result)``."""
    groups = dict.fromkeys(member.path.group for member in shape.members)
    moved = [name for name in _moved_arguments(shape) if name != "h_radial"]
    arguments = ["directions", "senders", "receivers", "angular", *(f"x{source}" for source in shape.sources)]
    arguments += [*(f"g{group}" for group in groups), *moved, "result"]
    lines = [*_header("to_radial", arguments, ["BLOCK"]), "    pair = tl.program_id(0).to(tl.int64)"]
    lines += [*_channels(shape), "    kind = angular.dtype.element_ty", *_ENDS]
    lines += [f"    s{number} = tl.zeros((BLOCK,), kind)" for number in range(len(shape.members))]
    lines += [
        "    for turn in range(0, count):",
        "        sender = tl.where(turn == 0, first, last)",
        "        receiver = tl.where(turn == 0, last, first)",
        "        sign = tl.where(turn == 0, 1.0, -1.0).to(kind)",
        *_angular_rows(shape),
    ]
    for source, dim in shape.sources.items():
        lines += _features("x", "x", source, dim, shape.channels, "sender")
        if shape.moved is not None and shape.moved[2 + source]:
            lines += _features("h_x", "hx", source, dim, shape.channels, "sender")
    for number, member in enumerate(shape.members):
        path = member.path
        _, by_angular, by_features = shape.moves(member)
        products = [("t", "x")] if shape.moved is None else []
        products += [("ht", "x")] * by_angular + [("t", "hx")] * by_features
        if not products:
            continue
        lines += _outer(member, number, "receiver")
        for first, ((row, features), m) in enumerate(itertools.product(products, range(path.dim_in))):
            terms = [f"{_angle(member, m, k, row)} * g{number}_{k}" for k in range(path.dim_out)]
            lines.append(f"        v {'+=' if first else '='} {features}{path.source}_{m} * ({' + '.join(terms)})")
        lines.append(f"        s{number} += {'sign * v' if path.odd else 'v'}")
    for number, member in enumerate(shape.members):
        place = f"result + pair * {shape.radial_width} + {member.radial} + c"
        lines.append(f"    tl.store({place}, s{number}, mask=inside)")
    return "\n".join(lines) + "\n"


def write_to_angular(shape: Shape) -> str:
    """Gradients by T of one path: ``to_angular(n_pairs, directions, senders, receivers, radial, x, g, h…, result)``.

    A program treats several pairs and few channels at a time, so that each thread sums the channels of a pair alone.
    """
    (member,) = shape.members
    path, channels = member.path, shape.channels
    x, hx, g = f"x{path.source}", f"h_x{path.source}", f"g{path.group}"
    by_radial, _, by_features = shape.moves(member)
    moved = [name for name in _moved_arguments(shape) if name != "h_angular"]
    arguments = ["n_pairs", "directions", "senders", "receivers", "radial", x, g, *moved, "result"]
    lines = [*_header("to_angular", arguments, ["PAIRS", "BLOCK"], "n_pairs")]
    lines += [
        "    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)",
        "    there = pair < n_pairs",
        "    kind = radial.dtype.element_ty",
        "    count = tl.load(directions + pair, mask=there, other=0)",
        "    first = tl.load(senders + pair, mask=there, other=0)",
        "    last = tl.load(receivers + pair, mask=there, other=0)",
    ]
    entries = list(itertools.product(range(path.dim_in), range(path.dim_out)))
    lines += [f"    s{m}_{k} = tl.zeros((PAIRS,), kind)" for m, k in entries]
    if shape.moved is None or by_radial or by_features:
        lines += [
            "    for turn in tl.static_range(2):",
            "        sender = first if turn == 0 else last",
            "        receiver = last if turn == 0 else first",
            f"        for start in range(0, {channels}, BLOCK):",
            "            c = (start + tl.arange(0, BLOCK))[None, :]",
            f"            inside = (turn < count)[:, None] & (c < {channels})",
        ]
        lines += _angular_products(shape, member, x, hx, g)
    place = f"result + pair * {shape.angular_width} + {member.angular}"
    lines += [f"    tl.store({place} + {m * path.dim_out + k}, s{m}_{k}, mask=there)" for m, k in entries]
    return "\n".join(lines) + "\n"


def _angular_products(shape: Shape, member: Member, x: str, hx: str, g: str) -> Iterator[str]:
    path, channels = member.path, shape.channels
    by_radial, _, by_features = shape.moves(member)
    sign = "(1 - 2 * turn) * " if path.odd else ""

    def load(place: str) -> str:
        return f"tl.load({place}, mask=inside, other=0.0)"

    yield f"            p = pair[:, None] * {shape.radial_width} + {member.radial} + c"
    if shape.moved is None or by_features:
        yield f"            r = {sign}{load('radial + p')}"
    if by_radial:
        yield f"            hr = {sign}{load('h_radial + p')}"
    yield f"            p = receiver[:, None] * {path.dim_out * member.width} + {path.column} + c"
    for k in range(path.dim_out):
        yield f"            g_{k} = {load(f'{g} + p + {k * member.width}')}"
    yield f"            p = sender[:, None] * {path.dim_in * channels} + c"
    for m in range(path.dim_in):
        parts = [f"r * {load(f'{x} + p + {m * channels}')}"] if shape.moved is None else []
        parts += [f"hr * {load(f'{x} + p + {m * channels}')}"] * by_radial
        parts += [f"r * {load(f'{hx} + p + {m * channels}')}"] * by_features
        yield f"            v = {' + '.join(parts)}"
        for k in range(path.dim_out):
            yield f"            s{m}_{k} += tl.sum(v * g_{k}, axis=1)"
