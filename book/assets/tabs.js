// A link may lead into a tab that is not chosen, as from the gallery or from a search: choose it.
function showTarget() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const panel = target?.closest(".sd-tab-content");
  if (!panel || panel.checkVisibility()) return;
  panel.previousElementSibling.click(); // its label
  target.scrollIntoView();
}

addEventListener("hashchange", showTarget);
addEventListener("load", showTarget);
