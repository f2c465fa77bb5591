"""Neighbouring notebook cells tagged `pytorch` and `tensorflow` become synced tabs.

In JupyterLab the cells stand one after the other.  On the page each run of neighbours becomes one
tab set of sphinx-design: radio buttons, so it works without a script; with one, choosing a
framework switches every tab set of the book and is remembered.
"""

from docutils import nodes
from sphinx.transforms import SphinxTransform
from sphinx_design.shared import create_component

LABELS = {"pytorch": "PyTorch", "tensorflow": "TensorFlow"}


def framework_of(node: nodes.Node) -> str | None:
    """The framework that a notebook cell is tagged with; None for any other node."""
    if isinstance(node, nodes.container) and node.get("nb_element") == "cell_code":
        for framework in LABELS:
            if f"tag_{framework}" in node["classes"]:
                return framework
    return None


def runs(children: list[nodes.Node]) -> list[dict[str, list[nodes.Node]]]:
    """Runs of neighbouring tagged cells, each as {framework: its cells}, in order.

    Consecutive cells of one framework share a tab.  A framework that comes back after the other
    one starts a new run, so that the page keeps the order in which the cells were executed.
    """
    found: list[dict[str, list[nodes.Node]]] = []
    last = None
    for child in children:
        framework = framework_of(child)
        if framework is not None:
            if last is None or (framework != last and framework in found[-1]):
                found.append({})
            found[-1].setdefault(framework, []).append(child)
        last = framework
    return [run for run in found if len(run) > 1]


def tab_set(run: dict[str, list[nodes.Node]]) -> nodes.Element:
    """The tab set of one run, as sphinx-design's own directive would build it."""
    items = []
    for framework in sorted(run, key=list(LABELS).index):
        text = LABELS[framework]
        label = nodes.rubric(text, nodes.Text(text), classes=["sd-tab-label"])
        label["sync_id"], label["sync_group"] = framework, "framework"
        content = create_component("tab-content", classes=["sd-tab-content"])
        content += run[framework]
        item = create_component("tab-item", classes=["sd-tab-item"], selected=False)
        item += [label, content]
        items.append(item)
    return create_component("tab-set", classes=["sd-tab-set", "framework-tabs"], children=items)


class FrameworkTabs(SphinxTransform):
    """Wrap the runs of a notebook's page."""

    default_priority = 900  # after the parser has built every cell

    def apply(self, **kwargs) -> None:
        parents = {cell.parent for cell in self.document.findall(framework_of)}
        for parent in parents:
            for run in runs(list(parent.children)):
                cells = [cell for group in run.values() for cell in group]
                position = min(parent.index(cell) for cell in cells)
                for cell in cells:
                    parent.remove(cell)
                parent.insert(position, tab_set(run))


def setup(app):
    app.add_transform(FrameworkTabs)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
