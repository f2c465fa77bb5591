// What scrolls sideways inside itself must be reachable by keyboard: give it a tab stop while it does.
const wide = ".wide-figure, div.math, .ledger-scroll, .pst-scrollable-table-container, .cell_output table, .verdict";

function setTabStop(box) {
  if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  else box.removeAttribute("tabindex");
}

// Also when a folded solution opens, a phone turns, or the fonts of the formulas arrive.
const boxes = document.querySelectorAll(wide);
const observer = new ResizeObserver((entries) => entries.forEach((entry) => setTabStop(entry.target)));
boxes.forEach((box) => observer.observe(box));
document.fonts.ready.then(() => boxes.forEach(setTabStop));
