// Paper is white: in the dark, a page takes the colours of the day while it is printed.
const page = document.documentElement.dataset;
let screenTheme = null;

function setTheme(printing) {
  if (printing && screenTheme === null && page.theme === "dark") {
    screenTheme = page.theme;
    page.theme = "light";
  } else if (!printing && screenTheme !== null) {
    page.theme = screenTheme;
    screenTheme = null;
  }
}

const paper = matchMedia("print");
paper.addEventListener("change", () => setTheme(paper.matches));
addEventListener("beforeprint", () => setTheme(true));
addEventListener("afterprint", () => setTheme(false));
