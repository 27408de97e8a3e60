"""What a compiled program reads and writes, counted in its text.

Each instruction of the compiled program that computes something is one kernel. It reads its
operands from the device's memory once, and writes its result there once. Exceptions:

- What is only taken apart, put together, named anew or set aside (tuples, bitcasts, the
  allocation of a buffer) costs nothing.
- Of an operand that it only slices, a kernel reads the slices. Of one that it updates in
  place, it reads nothing and writes the update.
- What lies in a TPU's memory on the chip costs nothing: `S(1)` in the text. So a copy from
  there, or to there, costs one side.
- A loop costs what its body does, as many times as it runs.
- Of a conditional the cheapest branch counts, and that there is a conditional is reported.
  Collectives are those of all branches.

Sizes are those of the shapes, without the padding of a TPU's tiles.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple


# Letters and bits of the type, dimensions, layout: `bf16[8,128]{1,0:T(8,128)S(1)}`.
ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\](?:\{([^}]*)\})?")
FREE = {
    "add-dependency",
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
SLICES = {"slice", "dynamic-slice"}
UPDATE = "dynamic-update-slice"
FREE_CALL = re.compile('custom_call_target="(?:AllocateBuffer|ConcatBitcast)"')
COLLECTIVES = {
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
}


class Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    # Names of instructions, or the number of a parameter.
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def result(self) -> str:
        """The shape of what it makes. What an instruction only starts comes after its
        operands; but a copy comes first, and an all-reduce alone."""
        if not self.opcode.endswith("-start") or self.opcode == "all-reduce-start":
            return self.shape
        return split(self.shape)[0 if self.opcode == "copy-start" else 1]

    @property
    def nbytes(self) -> int:
        return count_bytes(self.result)

    def called(self, *names: str) -> list[str]:
        """The computations that these attributes name."""
        pattern = rf"\b(?:{'|'.join(names)})=(\{{[^}}]*\}}|%[\w.-]+)"
        return re.findall(r"%([\w.-]+)", " ".join(re.findall(pattern, self.attributes)))


Computation = dict[str, Instruction]
Computations = dict[str, Computation]


@dataclass
class Cost:
    nbytes: int = 0
    kernels: int = 0
    # As estimated by a TPU's compiler, kernel by kernel.
    cycles: int = 0
    conditionals: int = 0
    # By kind: how many there are, and how many bytes each device hands over to them.
    collectives: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, other: "Cost", *, times: int = 1, runs: bool = True) -> None:
        """What need not run adds its conditionals and collectives alone."""
        self.nbytes += other.nbytes * times * runs
        self.kernels += other.kernels * times * runs
        self.cycles += other.cycles * times * runs
        self.conditionals += other.conditionals
        for kind, (number, nbytes) in other.collectives.items():
            had, sent = self.collectives.get(kind, (0, 0))
            self.collectives[kind] = (had + times * number, sent + times * nbytes)


def count_bytes(shape: str, *, on_chip: bool = False) -> int:
    """Of all arrays in it that lie in the device's main memory, or of all."""
    bits = 0
    for kind, width, dims, layout in ARRAY.findall(shape):
        if on_chip or "S(" not in layout:
            size = 8 if kind == "pred" else int(width or 0)
            bits += size * math.prod(int(dim) for dim in dims.split(",") if dim)
    return math.ceil(bits / 8)


def split(shape: str) -> list[str]:
    """The elements of a tuple's shape; of an array's, itself."""
    if not shape.startswith("("):
        return [shape]
    found, depth, start = [], 0, 1
    for at, character in enumerate(shape):
        depth += (character in "({[") - (character in ")}]")
        if depth == 0 or (depth == 1 and character == ","):
            found.append(shape[start:at])
            start = at + 1
    return found


def parse(text: str) -> tuple[Computations, str]:
    """The instructions of each computation, and the name of the one that is run."""
    header = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
    line = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.+?) ([a-z][\w-]*)\((.*?)\)(?:, (.*))?$")
    computations: Computations = {}
    entry, current = "", {}
    for each in text.splitlines():
        if found := header.match(each):
            current = computations[found[2]] = {}
            entry = found[2] if found[1] else entry
        elif found := line.match(each):
            root, name, shape, opcode, inner, attributes = found.groups()
            operands = re.findall(r"%([\w.-]+)", inner) or [inner]
            current[name] = Instruction(
                name, shape, opcode, tuple(operands), attributes or "", root is not None
            )
    if not entry:
        raise ValueError("the text has no entry computation")
    return computations, entry


def count(text: str) -> Cost:
    """What one run of the program costs."""
    return _cost(*parse(text))


def _cost(computations: Computations, name: str) -> Cost:
    total, computation = Cost(), computations[name]
    for each in computation.values():
        opcode = each.opcode
        if opcode in FREE or opcode.endswith(("-done", "-update")):
            continue
        if opcode == "custom-call" and FREE_CALL.search(each.attributes):
            continue
        if opcode in ("call", "async-start"):
            for called in each.called("to_apply", "calls"):
                total.add(_cost(computations, called))
        elif opcode == "while":
            times = _times(computations, each)
            for called in each.called("body", "condition"):
                total.add(_cost(computations, called), times=times)
        elif opcode == "conditional":
            names = ("branch_computations", "true_computation", "false_computation")
            branches = [_cost(computations, called) for called in each.called(*names)]
            cheapest = min(branches, key=lambda branch: branch.nbytes)
            for branch in branches:
                total.add(branch, runs=branch is cheapest)
            total.conditionals += 1
        else:
            total.add(_kernel(computations, computation, each))
    return total


def _times(computations: Computations, loop: Instruction) -> int:
    """How often it runs: as noted, or else the number that its condition compares with."""
    noted = re.findall(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    (condition,) = loop.called("condition")
    compared = [
        each.operands[0]
        for each in computations[condition].values()
        if each.opcode == "constant"
    ]
    times = noted or compared
    if len(times) != 1 or not times[0].isdigit():
        raise ValueError(f"the text does not say how often {loop.name} runs")
    return int(times[0])


def _kernel(
    computations: Computations, computation: Computation, each: Instruction
) -> Cost:
    sizes = {
        name: computation[name].nbytes for name in each.operands if name in computation
    }
    # An operand that is given twice is read once, as much as is taken at either place.
    read = dict.fromkeys(sizes, 0)
    for position, name in enumerate(each.operands):
        if name in sizes:
            taken = _taken(computations, each, position, sizes[name])
            read[name] = min(sizes[name], read[name] + taken)
    cost = Cost(_written(computations, computation, each) + sum(read.values()), kernels=1)
    if cycles := re.search(r'"estimated_cycles":"(\d+)"', each.attributes):
        cost.cycles = int(cycles[1])
    kind = each.opcode.removesuffix("-start")
    if kind in COLLECTIVES:
        shapes = [computation[name].shape for name in sizes]
        cost.collectives[kind] = (1, sum(count_bytes(s, on_chip=True) for s in shapes))
    return cost


def _taken(
    computations: Computations, each: Instruction, position: int, nbytes: int
) -> int:
    """What it reads of its operand at that position, which has so many bytes."""
    if position == 0 and each.opcode.removesuffix("-start") in SLICES:
        return min(nbytes, count_bytes(each.result, on_chip=True))
    if position == 0 and each.opcode == UPDATE:
        return 0
    if each.opcode != "fusion":
        return nbytes
    (called,) = each.called("calls")
    inside = computations[called]
    (parameter,) = (
        name
        for name, one in inside.items()
        if one.opcode == "parameter" and one.operands == (str(position),)
    )
    total = 0
    for user, at in _uses(inside, parameter):
        in_place = user.opcode != UPDATE or user in _results(inside)
        total += _taken(computations, user, at, nbytes) if in_place else nbytes
    return min(nbytes, total)


def _uses(inside: Computation, name: str) -> Iterator[tuple[Instruction, int]]:
    """What takes it as an operand, and as which, by this or another name."""
    for user in inside.values():
        for position, operand in enumerate(user.operands):
            if operand == name and user.opcode == "bitcast" and not user.is_root:
                yield from _uses(inside, user.name)
            elif operand == name:
                yield user, position


def _results(inside: Computation) -> list[Instruction]:
    """What a fusion writes, in the order of its shape."""
    (root,) = (each for each in inside.values() if each.is_root)
    results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for at, result in enumerate(results):
        while result.opcode == "bitcast":
            result = inside[result.operands[0]]
        results[at] = result
    return results


def _written(
    computations: Computations, computation: Computation, each: Instruction
) -> int:
    if each.opcode == UPDATE:
        return computation[each.operands[1]].nbytes
    if each.opcode != "fusion":
        return each.nbytes
    (called,) = each.called("calls")
    inside = computations[called]
    total = 0
    for shape, result in zip(split(each.shape), _results(inside), strict=True):
        nbytes = count_bytes(shape)
        if result.opcode == UPDATE:
            nbytes = min(nbytes, inside[result.operands[1]].nbytes)
        total += nbytes
    return total
