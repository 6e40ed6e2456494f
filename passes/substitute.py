"""Replace reads of computed weights by the graphs that compute them.

    before   w = get_attr('rnn.weight_hh')
             y = linear(x, w)
    after    a = get_attr('rnn.parametrizations.weight_hh.original')
             w = matrix_exp(sub(tril(a), mH(tril(a))))
             deliver('rnn.weight_hh', w)
             y = linear(x, w)

Each site is computed once, at the head of the graph, each after those it reads; then all aliases of a tied weight read the
same node.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from torch import fx

from fxparam.errors import PassError
from fxparam.program import Fragment, Pass, Program, Record, Site, deliver
from fxparam.program.program import keep_signature


@final
@dataclass(frozen=True, eq=False)
class Substitute(Pass):
    """Inline the fragment of every site.

    Args:
        fragments: the traced graph of each site, by its home.
    """

    fragments: Mapping[str, Fragment]
    name: ClassVar[str] = "substitute"
    gives: ClassVar[frozenset[str]] = frozenset({"substituted"})

    def rewrite(self, program: Program) -> Program:
        if not program.sites:
            return program
        new = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {
            node: new.node_copy(node) for node in program.graph.nodes if node.op == "placeholder"
        }
        reads: dict[str, fx.Node] = {}
        computed = program.weights
        records = []
        for site in program.sites:
            fragment = self.fragments[site.home]
            reads.update(_inline(new, site, fragment, reads))
            if fragment.opaque:
                records.append(Record(self.name, f"look into {site.home}", fragment.opaque, refused=True))
        for site in program.sites:
            for name in site.names:
                new.call_function(deliver, (name, reads[name]))
        for node in program.graph.nodes:
            if node.op == "get_attr" and node.target in computed:
                mapping[node] = reads[str(node.target)]
            elif node.op != "placeholder":
                mapping[node] = new.node_copy(node, mapping.__getitem__)
        keep_signature(new, program.graph)
        records.append(Record(self.name, f"computed {sum(len(site.names) for site in program.sites)} weights in the graph"))
        return program.evolve(graph=new).noting(*records)

    def verify(self, before: Program, after: Program) -> None:
        computed = after.weights
        left = [node for node in after.graph.nodes if node.op == "get_attr" and node.target in computed]
        if left:
            raise PassError(f"{left[0].target} is still read as a tensor")


def _inline(new: fx.Graph, site: Site, fragment: Fragment, reads: dict[str, fx.Node]) -> dict[str, fx.Node]:
    """Append a fragment; returns the nodes of its weights, under all their names, and of the tensors it reads."""
    added: dict[str, fx.Node] = {}
    mapping: dict[fx.Node, fx.Node] = {}
    inputs = iter(fragment.inputs)
    for node in fragment.graph.nodes:
        if node.op == "placeholder":
            name = next(inputs)
            if name not in reads and name not in added:
                added[name] = new.get_attr(name)
                added[name].meta["latent"] = site.home
            mapping[node] = reads.get(name) or added[name]
        elif node.op == "output":
            for aliases, value in zip(site.aliases, node.args[0], strict=True):
                added |= dict.fromkeys(aliases, mapping[value])
        else:
            mapping[node] = new.node_copy(node, mapping.__getitem__)
            mapping[node].meta["site"] = site.home
    return added
