// What scrolls sideways inside itself must be reachable by keyboard: give it a tab stop while it does.
const wide = "div.math, .ledger-scroll, .pst-scrollable-table-container, .cell_output table, .verdict";

function addTabStops() {
  for (const box of document.querySelectorAll(wide)) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}

addTabStops();
addEventListener("resize", addTabStops);
