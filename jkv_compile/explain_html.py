"""An explanation as one HTML page that needs nothing else: the account of each graph, and its text before and after."""

from __future__ import annotations

import difflib
import html
from collections.abc import Iterator, Sequence

from .report import OUTCOMES, Break, GraphReport, Match, Rejected

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1400px; padding: 0 1rem; color: #1d2733 }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #c9d2dc }
.site { margin: .6rem 0; padding: .5rem .9rem; border-left: 4px solid #2f7d4f; background: #f2f8f4 }
.left { border-color: #b3541e; background: #fbf4ee }
.note { border-color: #8a94a0; background: #f5f6f8 }
.break { border-color: #6b5fb0; background: #f4f3fa }
.site b { font-family: ui-monospace, monospace; font-weight: 600 }
.graphs { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 1rem }
pre { overflow-x: auto; padding: .8rem; background: #f5f6f8; font: 12px/1.5 ui-monospace, monospace; margin: 0 }
del, ins { text-decoration: none; display: inline-block; min-width: 100% }
del { background: #fbe3d6 } ins { background: #d8f0df }
h3 { font-size: 1em; margin: .8rem 0 .3rem }
@media (prefers-color-scheme: dark) {
  body { background: #14181d; color: #dde3ea } pre { background: #1d232a } h2 { border-color: #39424d }
  .site { background: #17261d } .left { background: #2a1e15 } .note { background: #1d232a }
  .break { background: #1f1d2e }
  del { background: #4a2a1a } ins { background: #1c4229 }
}
"""


def page(summary: str, config: str, graphs: Sequence[GraphReport]) -> str:
    """The page; everything that comes from a model's source is escaped."""
    body = "".join(_graph(i, graph) for i, graph in enumerate(graphs, 1))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>jkv_compile.explain</title>'
        f"<style>{_STYLE}</style></head><body><h1>jkv_compile.explain</h1>"
        f"<p>{html.escape(summary)}</p><p><code>{html.escape(config)}</code></p>{body}</body></html>\n"
    )


def _graph(number: int, graph: GraphReport) -> str:
    sites: list[tuple[str, Match | Rejected | Break]] = [("", m) for m in graph.matches]
    sites += [("left", r) for r in graph.rejections] + [("note", n) for n in graph.notes]
    sites += [("break", graph.graph_break)] if graph.graph_break else []
    texts = f"<h3>as captured</h3><pre>{html.escape(graph.before)}</pre>"
    if graph.after:
        before, after = ("\n".join(lines) for lines in zip(*_side_by_side(graph.before, graph.after)))
        texts = (
            f'<div class="graphs"><div><h3>as captured</h3><pre>{before}</pre></div>'
            f"<div><h3>as rewritten</h3><pre>{after}</pre></div></div>"
        )
    heading = f"Graph {number}, {graph.nodes} nodes: {OUTCOMES[graph.outcome]}"
    return f"<h2>{html.escape(heading)}</h2>{''.join(_site(kind, s) for kind, s in sites)}{texts}"


def _site(kind: str, site: Match | Rejected | Break) -> str:
    first, *rest = (html.escape(line.strip()) for line in site.lines())
    return f'<div class="site {kind}"><b>{first}</b><br>{"<br>".join(rest)}</div>'


def _side_by_side(before: str, after: str) -> Iterator[tuple[str, str]]:
    """Lines of both graphs beside each other: what is only in the one marked <del>, what is only in the other <ins>."""
    old, new = before.splitlines(), after.splitlines()
    for kind, i, j, m, n in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        left, right = [html.escape(x) for x in old[i:j]], [html.escape(x) for x in new[m:n]]
        if kind != "equal":
            left, right = [f"<del>{x}</del>" for x in left], [f"<ins>{x}</ins>" for x in right]
        height = max(len(left), len(right))
        yield from zip(left + [""] * (height - len(left)), right + [""] * (height - len(right)))
