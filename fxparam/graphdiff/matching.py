"""Which node of one graph is which node of another.

If the canonical orders agree, the graphs are isomorphic and the zip of the two orders is the map. Otherwise the
matching is built in steps, each of which links only nodes that are still free and have equal labels:

1. nodes with a dotted name that occurs once on either side;
2. nodes with the same computation (hash from the inputs) and the same uses (hash from the output), then either alone:
   what lies before or after all edits (the subtree hashes of Chawathe et al., *Change detection in hierarchically
   structured information*, SIGMOD 1996, and of GumTree, Falleri et al., ASE 2014, on a graph with sharing);
3. nodes whose neighbourhood of radius 8, ..., 0 occurs once (Weisfeiler-Lehman colours; unique anchors as in patience
diff);
4. what is left of repeated computations, in canonical order;
5. an alignment of the remaining nodes in canonical order (Myers, *An O(ND) difference algorithm*, Algorithmica 1986).

Step 2 is done in both orders and the better map kept.

After each step links spread along edges: the sources of linked nodes at the same argument position, and users that are
the only ones of their kind. Last, free nodes at the same place are linked although their labels differ: they
*changed*. A wrong guess costs a longer difference, never a wrong one: what is reported is read off the finished map.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

from fxparam.graphdiff.graph import Edge, Graph
from fxparam.graphdiff.myers import common_subsequence

_RADII = (8, 4, 3, 2, 1, 0)
_SEARCH_LIMIT = 200  # dead nodes up to which an isomorphism between dead parts is searched for
_LOOK = 32  # users of one value that are looked at as candidates for a changed node
Pairs = dict[int, int]


def isomorphism(a: Graph, b: Graph) -> Pairs | None:
    """A bijection that keeps labels, edges and the order of effects, or ``None``.

    Exact and linear, but for dead nodes (which nothing observable depends on) that are symmetric: there it falls back
    to a VF2 search up to a size of 200, and gives up above.
    """
    if len(a.nodes) != len(b.nodes) or a.live != b.live:
        return None
    pairs = dict(zip(a.order, b.order, strict=True))
    wrong = next((k for k, (i, j) in enumerate(pairs.items()) if not _agree(a, b, i, j, pairs)), None)
    if wrong is None:
        return pairs
    if wrong < a.live or len(a.nodes) - a.live > _SEARCH_LIMIT:
        return None
    return _search(a, b, pairs)


def _agree(a: Graph, b: Graph, i: int, j: int, pairs: Pairs) -> bool:
    x, y = a.nodes[i], b.nodes[j]
    return (
        x.label == y.label
        and [(pairs[e.node], e.output) for e in x.inputs] == [(e.node, e.output) for e in y.inputs]
        and {pairs[n] for n in x.after} == set(y.after)
    )


def _search(a: Graph, b: Graph, pairs: Pairs) -> Pairs | None:
    """An isomorphism that extends ``pairs`` on the live nodes to the dead ones (VF2)."""
    import networkx as nx
    from networkx.algorithms.isomorphism import DiGraphMatcher, categorical_edge_match, categorical_node_match

    def dead_part(graph: Graph, number: dict[int, int]) -> Any:
        result = nx.DiGraph()
        for i in graph.order[graph.live :]:
            result.add_node(i, color=graph.nodes[i].label)
            edges = defaultdict(list)
            for position, edge in enumerate(graph.nodes[i].inputs):
                edges[edge.node].append((position, edge.output))
            for node in graph.nodes[i].after:
                edges[node].append((-1, 0))
            for node, at in edges.items():
                if node in number:
                    result.add_node(node, color=number[node])
                result.add_edge(node, i, at=tuple(at))
        return result

    live_a, live_b = ({n: k for k, n in enumerate(g.order[: g.live])} for g in (a, b))
    matcher = DiGraphMatcher(
        dead_part(a, live_a),
        dead_part(b, live_b),
        categorical_node_match("color", None),
        categorical_edge_match("at", None),
    )
    return {**pairs, **matcher.mapping} if matcher.is_isomorphic() else None


def match(a: Graph, b: Graph) -> Pairs:
    """A map between nodes of ``a`` and nodes of ``b``, injective; an isomorphism where there is one."""
    found = isomorphism(a, b)
    if found is None:
        # In a run of equal operations either hash may pair nodes one off; the other one then does not.
        both = (_Matcher(a, b).run(from_output_first=first) for first in (False, True))
        found = min(both, key=lambda pairs: _cost(a, b, pairs))
    return found


def _cost(a: Graph, b: Graph, pairs: Pairs) -> int:
    """Free nodes, changed labels and edges that the map does not keep."""
    cost = len(a.nodes) + len(b.nodes) - 2 * len(pairs)
    for i, j in pairs.items():
        x, y = a.nodes[i], b.nodes[j]
        kept = sum(pairs.get(e.node) == f.node and e.output == f.output for e, f in zip(x.inputs, y.inputs, strict=False))
        cost += max(len(x.inputs), len(y.inputs)) - kept + (x.label != y.label)
    return cost


class _Matcher:
    def __init__(self, a: Graph, b: Graph) -> None:
        self.a, self.b = a, b
        self.to: Pairs = {}
        self.back: Pairs = {}
        self.fresh: list[tuple[int, int]] = []
        self.intern: dict[Hashable, int] = {}
        self.kind_a, self.kind_b = ([self.color(n.label) for n in g.nodes] for g in (a, b))

    def color(self, key: Hashable) -> int:
        """A number for ``key``, the same for equal keys of both graphs: an exact hash."""
        return self.intern.setdefault(key, len(self.intern))

    def run(self, *, from_output_first: bool) -> Pairs:
        a, b = self.a, self.b
        self.unique(*([n.label[:3] if n.target or n.kind == "output" else None for n in g.nodes] for g in (a, b)))
        down_a, down_b = self.from_inputs(a, self.kind_a), self.from_inputs(b, self.kind_b)
        up_a, up_b = self.from_output(a, self.kind_a), self.from_output(b, self.kind_b)
        self.unique(list(zip(down_a, up_a, strict=True)), list(zip(down_b, up_b, strict=True)))
        one_sided = [(down_a, down_b), (up_a, up_b)]
        for keys in reversed(one_sided) if from_output_first else one_sided:
            self.unique(*keys)
        self.spread()
        for radius in _RADII:
            self.unique(*self.neighbourhoods(radius))
            self.spread(self.to.items())
        self.repeated(down_a, down_b)
        self.repeated(up_a, up_b)
        self.align()
        self.changed()
        return self.to

    # ------------------------------------------------------------------ links

    def link(self, i: int, j: int) -> None:
        self.to[i], self.back[j] = j, i
        self.fresh.append((i, j))

    def groups(self, keys_a: list[Any], keys_b: list[Any]) -> Iterator[tuple[list[int], list[int]]]:
        """Free nodes of either graph with the same key; a key of ``None`` is none."""
        found: dict[Hashable, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for i in self.a.order:
            if i not in self.to and keys_a[i] is not None:
                found[keys_a[i]][0].append(i)
        for j in self.b.order:
            if j not in self.back and keys_b[j] is not None:
                found[keys_b[j]][1].append(j)
        return (group for group in found.values() if all(group))

    def unique(self, keys_a: list[Any], keys_b: list[Any]) -> None:
        """Link the free nodes whose key occurs once on either side."""
        for left, right in self.groups(keys_a, keys_b):
            if len(left) == len(right) == 1:
                self.link(left[0], right[0])

    def repeated(self, keys_a: list[int], keys_b: list[int]) -> None:
        """Link free nodes with the same key in canonical order, and spread after each."""
        for left, right in self.groups(keys_a, keys_b):
            for i, j in zip(left, right, strict=False):
                if i not in self.to and j not in self.back:
                    self.link(i, j)
                    self.spread()

    def spread(self, start: Iterable[tuple[int, int]] = ()) -> None:
        """Follow edges from new links to free nodes with equal labels, as long as there is no choice."""
        self.fresh.extend(start)
        while self.fresh:
            i, j = self.fresh.pop()
            for e, f in zip(self.a.nodes[i].inputs, self.b.nodes[j].inputs, strict=False):
                if e.output == f.output and self.free(e.node, f.node) and self.kind_a[e.node] == self.kind_b[f.node]:
                    self.link(e.node, f.node)
            users_a = self.free_users(self.a, i, self.to, self.kind_a)
            users_b = self.free_users(self.b, j, self.back, self.kind_b) if users_a else {}
            for key, left in users_a.items():
                right = users_b.get(key, ())
                if len(left) == len(right) == 1 and self.free(left[0], right[0]):
                    self.link(left[0], right[0])

    def free(self, i: int, j: int) -> bool:
        return i not in self.to and j not in self.back

    @staticmethod
    def free_users(graph: Graph, index: int, taken: Pairs, kinds: list[int]) -> dict[tuple[int, int], list[int]]:
        result: dict[tuple[int, int], list[int]] = defaultdict(list)
        for user, position in graph.users[index]:
            if user not in taken:
                result[position, kinds[user]].append(user)
        return result

    # ------------------------------------------------------------------ hashes

    def from_inputs(self, graph: Graph, kinds: list[int]) -> list[int]:
        hashes: list[int] = []
        for node, kind in zip(graph.nodes, kinds, strict=True):
            edges = tuple((hashes[e.node], e.output) for e in node.inputs)
            hashes.append(self.color(("down", kind, edges, tuple(sorted(hashes[i] for i in node.after)))))
        return hashes

    def from_output(self, graph: Graph, kinds: list[int]) -> list[int]:
        hashes = [0] * len(graph.nodes)
        for i in reversed(range(len(graph.nodes))):
            uses = tuple(sorted((hashes[user], position) for user, position in graph.users[i]))
            hashes[i] = self.color(("up", kinds[i], uses))
        return hashes

    def neighbourhoods(self, radius: int) -> tuple[list[int], list[int]]:
        """Weisfeiler-Lehman colours; a linked node has the color of its pair."""
        colors_a = [self.color(("pair", i)) if i in self.to else c for i, c in enumerate(self.kind_a)]
        colors_b = [self.color(("pair", self.back[j])) if j in self.back else c for j, c in enumerate(self.kind_b)]
        for _ in range(radius):
            colors_a, colors_b = self.refine(self.a, colors_a, self.to), self.refine(self.b, colors_b, self.back)
        return colors_a, colors_b

    def refine(self, graph: Graph, colors: list[int], taken: Pairs) -> list[int]:
        def color(i: int) -> int:
            if i in taken:
                return colors[i]
            sources = tuple((colors[e.node], e.output) for e in graph.nodes[i].inputs)
            return self.color(("near", colors[i], sources, tuple(sorted((colors[u], p) for u, p in graph.users[i]))))

        return [color(i) for i in range(len(colors))]

    # ------------------------------------------------------------------ alignment and changes

    def align(self) -> None:
        """Align the free nodes in canonical order, and keep links that at least one edge agrees with."""
        left = [i for i in self.a.order if i not in self.to]
        right = [j for j in self.b.order if j not in self.back]
        found = common_subsequence([self.kind_a[i] for i in left], [self.kind_b[j] for j in right])
        tried = [(left[x], right[y]) for x, y in found]
        for i, j in tried:
            self.link(i, j)
        for i, j in tried:
            if not self.agreement(i, j):
                del self.to[i], self.back[j]
        self.fresh = [(i, j) for i, j in self.fresh if self.to.get(i) == j]
        self.spread()

    def agreement(self, i: int, j: int) -> int:
        """How many edges of ``i`` go, under the map, where those of ``j`` go."""
        sources = zip(self.a.nodes[i].inputs, self.b.nodes[j].inputs, strict=False)
        agree = sum(e.output == f.output and self.to.get(e.node) == f.node for e, f in sources)
        uses = set(self.b.users[j][:_LOOK])
        return agree + sum((self.to.get(user), position) in uses for user, position in self.a.users[i][:_LOOK])

    def changed(self) -> None:
        """Link free nodes of one kind at the same place: with the same operator, with the same form of arguments, any.

        A link opens places next to it, at which the closer resemblances are tried first.
        """
        for level in range(3):
            for i in self.a.order:
                todo = [(i, level)]
                while todo:
                    current, most = todo.pop()
                    if current not in self.to and self.pair(current, most):
                        near = [*self.a.sources(current), *(user for user, _ in self.a.users[current])]
                        todo += [(n, closer) for closer in reversed(range(max(level, 1))) for n in near]

    def pair(self, i: int, level: int) -> bool:
        """Link ``i`` with the free node most like it; says whether there was one."""
        x = self.a.nodes[i]

        def alike(j: int) -> bool:
            y = self.b.nodes[j]
            same = (x.op == y.op, x.template == y.template, True)
            return x.kind == y.kind and same[level]

        near = [j for j in self.candidates(i) if alike(j)]
        if near:
            self.link(i, max(near, key=lambda j: (x.target == self.b.nodes[j].target, self.agreement(i, j))))
            self.spread()
        return bool(near)

    def candidates(self, i: int) -> list[int]:
        """Free nodes of ``b`` that read or feed, at the same position, what ``i`` reads or feeds."""
        found: dict[int, None] = {}
        for position, edge in enumerate(self.a.nodes[i].inputs):
            if edge.node in self.to:
                users = self.b.users[self.to[edge.node]]
                free = [u for u, p in users if p == position and u not in self.back]
                found.update(dict.fromkeys(free[:_LOOK]))
        for user, position in self.a.users[i][:_LOOK]:
            inputs: tuple[Edge, ...] = self.b.nodes[self.to[user]].inputs if user in self.to else ()
            if position < len(inputs) and inputs[position].node not in self.back:
                found[inputs[position].node] = None
        return list(found)
