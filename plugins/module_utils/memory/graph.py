# Copyright: Contributors to the homelab.inference project
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How large the buffers are in which a graph is computed: the rules of ggml's scheduler and allocator, without data.

A graph is a list of tensors in the order of their computation. The scheduler gives each to a device, cuts the list
where the device changes and copies over what crosses the cut; the allocator reuses room as soon as a tensor has had
its last reader. The largest extent on a device is its compute buffer. The rules are those of ggml 0.27.0
(ggml-backend.cpp, ggml-alloc.c).
"""

from __future__ import annotations

ALIGNMENT = 64
HOST = -1  # the processor, which has the last word on what nobody else takes


class Tensor:
    """One tensor: what it reads, how long its data are, and on which device something forces it."""

    __slots__ = (
        "address", "allocated", "base", "children", "device", "inplace", "input", "layout", "none", "output", "owner",
        "pin", "plain", "reads", "size", "views",
    )  # fmt: skip

    def __init__(
        self,
        size: int,
        reads: tuple[Tensor, ...] = (),
        layout: object = None,
        inplace: bool = False,
        pin: int | None = None,
    ) -> None:
        self.size = -(-size // ALIGNMENT) * ALIGNMENT
        self.reads: list[Tensor] = list(reads)
        self.layout = self if layout is None else layout
        self.inplace = inplace
        self.pin = pin  # the device that it must be computed on
        self.base: Tensor | None = None  # whose data it shows
        self.plain = False  # a mere view, which no device computes
        self.none = False  # computed by nobody: an input, a copy
        self.input = self.output = False
        self.owner = False  # its data lie elsewhere (weights, caches)
        self.device: int | None = None
        self.allocated = False
        self.children = self.views = 0
        self.address = 0


class Graph:
    """Tensors in the order in which they are computed."""

    def __init__(self) -> None:
        self.nodes: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self._seen: set[int] = set()

    def expand(self, tensor: Tensor) -> Tensor:
        """Put a tensor behind everything that it reads."""
        if id(tensor) in self._seen:
            return tensor
        self._seen.add(id(tensor))
        for read in tensor.reads:
            self.expand(read)
        (self.leaves if tensor.none else self.nodes).append(tensor)
        return tensor


def view(of: Tensor) -> Tensor:
    """Return another look at a tensor's data. Nothing is computed in place of what is only looked at."""
    tensor = Tensor(0, (of,))
    tensor.base = of.base or of
    tensor.plain = True
    return tensor


def stored(device: int) -> Tensor:
    """Return a tensor that has its place already: a cache."""
    tensor = Tensor(0)
    tensor.none = tensor.owner = True
    tensor.device = device
    return tensor


def given(size: int) -> Tensor:
    """Return an input; it is made on the processor."""
    tensor = Tensor(size)
    tensor.none = tensor.input = True
    return tensor


def sizes(graph: Graph, devices: int, copies: int = 1) -> list[int]:
    """Return the bytes of the compute buffer of each device, of the processor last.

    With more than one copy of all inputs the devices work on several batches at the same time.
    """
    _assign(graph, devices)
    nodes, leaves = _split(graph, devices, copies)
    pools = [_Pool() for _device in range(devices + 1)]
    _allocate(nodes, leaves, pools)
    return [pool.extent for pool in pools]


def _assign(graph: Graph, devices: int) -> None:
    """Give each tensor its device: where its weights are, else where its neighbours are; devices before processor."""
    if not devices:
        for tensor in (*graph.leaves, *graph.nodes):
            tensor.device = 0
        return
    host = devices
    for tensor in graph.leaves:
        if tensor.device in (None, HOST):
            tensor.device = host
    todo = []
    for tensor in graph.nodes:
        if tensor.plain:
            continue
        todo.append(tensor)
        if tensor.pin is not None:
            tensor.device = host if tensor.pin == HOST else tensor.pin
        elif tensor.base is not None and tensor.base.owner:
            tensor.device = tensor.base.device
    for order, hosts in ((todo, False), (todo[::-1], False), (todo, True), (todo[::-1], True)):
        current: int | None = None
        for tensor in order:
            if tensor.device is None:
                tensor.device = current
            elif tensor.device == host and not hosts:
                current = None
            else:
                current = tensor.device
    for tensor in graph.nodes:
        if tensor.plain:
            # Bases come first in the order.
            tensor.device = tensor.base.device  # type: ignore[union-attr]


def _split(graph: Graph, devices: int, copies: int) -> tuple[list[Tensor], list[Tensor]]:
    """Cut the graph where the device changes and put in the copies of what crosses."""
    nodes: list[Tensor] = []
    made: dict[tuple[int, int], Tensor] = {}
    extra: list[Tensor] = []
    if copies > 1:
        for leaf in graph.leaves:
            if leaf.input:
                leaf.output = True
                extra.append(leaf)
                extra += [_duplicate(leaf, leaf.device) for _copy in range(copies - 1)]
    current: int | None = None
    part: list[Tensor] = []
    crossing: list[tuple[Tensor, Tensor]] = []

    def close() -> None:
        for source, copy in crossing:
            dependency = Tensor(0, (source,))
            dependency.base, dependency.none, dependency.device = source.base or source, True, source.device
            nodes.append(dependency)
            nodes.append(copy)
        nodes.extend(part)
        part.clear()
        crossing.clear()

    for tensor in graph.nodes:
        if tensor.plain:
            part.append(tensor)
            continue
        if tensor.device != current:
            if current is not None:
                close()
            current = tensor.device
        reads = tensor.reads
        for index, read in enumerate(reads):
            if read.device != current:
                key = (id(read), current or 0)
                if key not in made:
                    made[key] = _duplicate(read, current)
                    if copies > 1:
                        made[key].input = made[key].output = True
                        extra.append(made[key])
                        for _copy in range(copies - 1):
                            extra.append(_duplicate(read, current))
                            extra[-1].input = extra[-1].output = True
                    crossing.append((read, made[key]))
                reads[index] = made[key]
        part.append(tensor)
    close()
    return nodes, extra + graph.leaves


def _duplicate(tensor: Tensor, device: int | None) -> Tensor:
    size = tensor.size
    root = tensor
    while not size and root.reads:
        root = root.reads[0]
        size = root.size
    copy = Tensor(size, layout=tensor.layout)
    copy.none, copy.device = True, device
    copy.input = tensor.input
    return copy


class _Pool:
    """The room of one device: free blocks in order of their address, the last one without end."""

    __slots__ = ("extent", "free")

    def __init__(self) -> None:
        self.free: list[list[int]] = [[0, 1 << 60]]
        self.extent = 0

    def take(self, size: int) -> int:
        """Return the address of the smallest block that is large enough; of the last one when none is."""
        blocks = self.free
        best, fit = len(blocks) - 1, 1 << 61
        for index in range(len(blocks) - 1):
            room = blocks[index][1]
            if size <= room <= fit:
                best, fit = index, room
        block = blocks[best]
        address = block[0]
        block[0] += size
        block[1] -= size
        if not block[1]:
            del blocks[best]
        if address + size > self.extent:
            self.extent = address + size
        return address

    def give(self, address: int, size: int) -> None:
        """Take a block back and join it with its neighbours."""
        if not size:
            return
        blocks = self.free
        index = 0
        while index < len(blocks) and blocks[index][0] < address:
            index += 1
        blocks.insert(index, [address, size])
        if index + 1 < len(blocks) and address + size == blocks[index + 1][0]:
            blocks[index][1] += blocks[index + 1][1]
            del blocks[index + 1]
        if index and blocks[index - 1][0] + blocks[index - 1][1] == address:
            blocks[index - 1][1] += blocks[index][1]
            del blocks[index]


def _allocate(nodes: list[Tensor], leaves: list[Tensor], pools: list[_Pool]) -> None:
    def allocate(tensor: Tensor) -> None:
        if tensor.allocated or tensor.owner or tensor.base is not None:
            return
        tensor.allocated = True
        if tensor.inplace:
            for parent in tensor.reads:
                if (
                    parent.base is None
                    and parent.allocated
                    and not parent.output
                    and parent.layout == tensor.layout
                    and parent.children == 1
                    and not parent.views
                ):
                    tensor.device, tensor.address = parent.device, parent.address
                    parent.allocated = False
                    return
        tensor.address = pools[tensor.device or 0].take(tensor.size)

    def free(tensor: Tensor) -> None:
        if not tensor.output:
            pools[tensor.device or 0].give(tensor.address, tensor.size)
            tensor.allocated = False

    for leaf in leaves:
        allocate(leaf)
    for node in nodes:
        if node.base is not None and not node.none:
            node.base.views += 1
        for read in node.reads:
            read.children += 1
    for node in nodes:
        allocate(node)
        for parent in node.reads:
            parent.children -= 1
            if parent.children or parent.views:
                continue
            if parent.base is not None:
                base = parent.base
                base.views -= 1
                if not base.views and not base.children and base.allocated:
                    free(base)
            elif parent.allocated:
                free(parent)
