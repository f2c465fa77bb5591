"""Light pages: what all share in one file of each kind, and nothing that a page does not use.

The theme and the extensions give each page some twenty style sheets and scripts, most of which hold
up its first line, and 270 KB of icons of which a dozen are drawn.  When the pages are written, this
makes of them

- `book.css`, all style sheets without the rules that no page can use, and `math.css` where there is
  math;
- `book.js`, and `code.js` where there is something to copy, to unfold or to switch, neither of
  which holds up the page;
- icon fonts that hold only the icons in use;
- images that say how large they are, and that wait until the reader comes near.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from posixpath import join, normpath

import tinycss2
from fontTools import subset
from fontTools.ttLib import TTFont

#: Style sheets of math: on the pages that have some.
MATH = re.compile(r"katex")
#: Scripts for code cells, folded boxes and tabs, and how a page looks that needs them.
CODE = re.compile(r"clipboard|copybutton|togglebutton|design-tabs|/tabs\.js")
USES_CODE = re.compile(
    r'<div class="highlight'
    r'|class="(?:[^"]* )?(?:sd-tab-set|toggle)[ "]'
    r'|class="(?=[^"]*\badmonition\b)[^"]*\bdropdown\b'
)
USES_MATH = 'class="katex'
#: Scripts that only the page of search results needs: 80 KB, as the index of all words is one.
SEARCH = re.compile(r"searchtools|language_data|searchindex")
#: The theme's icons come from a web font; this script (540 KB compressed) draws none of them.
UNWANTED = re.compile(r"fontawesome\.js")
#: Options that nothing in this book asks for; they could not run before the script that holds them.
OPTIONS = re.compile(r"\s*<script>DOCUMENTATION_OPTIONS\.\w+ = [^<]*</script>")

STYLE = re.compile(
    r'[ \t]*<link (?=[^>]*\brel="stylesheet")(?![^>]*\bmedia=)[^>]*\bhref="([^"]+\.css)[^>]*>\n?'
)
SCRIPT = re.compile(r'[ \t]*<script (?:[^>]* )?src="([^"]+\.js)[^"]*"[^>]*></script>\n?')
PRELOAD = re.compile(r'\s*<link rel="preload" as="script"[^>]*>')
#: Pixels; the words in a wider figure cannot be read when it is no wider than a phone.
WIDE = 600
IMAGE = re.compile(r'<img (?![^>]*\bloading=)([^>]*)src="([^"]*_images/[^"]+)"([^>]*)>')
URL = re.compile(r"""url\(\s*(['"]?)(?!data:|['"#])([^)'"]+)\1\s*\)""")


# ---------------------------------------------------------------------------------------------
# Style sheets


def inlined(path: Path, root: Path) -> str:
    """A style sheet with what it imports; addresses in it are relative to `root`."""
    here = path.parent.relative_to(root).as_posix()
    text = path.read_text(encoding="utf-8")

    def address(match: re.Match[str]) -> str:
        target, _, query = match[2].partition("?")
        return f'url("{normpath(join(here, target))}{"?" * bool(query)}{query}")'

    return re.sub(
        r"""@import\s+(?:url\()?['"]([^'"]+)['"]\)?;""",
        lambda match: inlined(Path(normpath((path.parent / match[1]).as_posix())), root),
        URL.sub(address, text) if "@import" not in text else text,
    )


def words_in(texts: Iterable[str]) -> set[str]:
    """Every word that could be a class or an id."""
    return {word for text in texts for word in re.findall(r"[A-Za-z_][\w-]*", text)}


def used(selector: list, words: set[str]) -> bool:
    """Whether an element can match: all its classes and ids are among the words of the pages.

    What stands in parentheses, as in `:not(.wide)`, is taken to match.
    """
    after_dot = False
    for token in selector:
        named = (token.type == "ident" and after_dot) or (token.type == "hash")
        if named and token.value not in words:
            return False
        after_dot = token.type == "literal" and token.value == "."
    return True


def split(tokens: list) -> list[list]:
    """A list of selectors, at its commas."""
    parts: list[list] = [[]]
    for token in tokens:
        if token.type == "literal" and token.value == ",":
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def pruned(rules: list, words: set[str]) -> str:
    """The rules of a style sheet that some element of the pages can match."""
    kept = []
    for rule in rules:
        if rule.type == "qualified-rule":
            selectors = [part for part in split(rule.prelude) if used(part, words)]
            if selectors:
                heads = ",".join(tinycss2.serialize(part).strip() for part in selectors)
                kept.append(f"{heads}{{{tinycss2.serialize(rule.content).strip()}}}")
        elif rule.type == "at-rule" and rule.lower_at_keyword in ("media", "supports", "layer"):
            if rule.content is None:
                kept.append(rule.serialize())
                continue
            inner = tinycss2.parse_rule_list(rule.content, skip_comments=True, skip_whitespace=True)
            if text := pruned(inner, words):
                head = f"@{rule.at_keyword}{tinycss2.serialize(rule.prelude)}"
                kept.append(f"{head}{{{text}}}")
        elif rule.type == "at-rule" and rule.lower_at_keyword != "charset":
            kept.append(rule.serialize())
    return "\n".join(kept)


# ---------------------------------------------------------------------------------------------
# Icons


def with_few_icons(css: str, static: Path) -> str:
    """Make fonts of the icons that a style sheet draws; return it with those in place of the whole.

    Args:
        css: the style sheet; addresses in it are relative to `static`.
        static: the folder of the fonts.
    """
    icons = {ord(sign) for sign in css if "\ue000" <= sign <= "\uf8ff"}  # the private use area

    def small(match: re.Match[str]) -> str:
        font = TTFont(static / match[1])
        options = subset.Options(flavor="woff2", hinting=False, layout_features=[])
        options.drop_tables += ["FFTM"]
        subsetter = subset.Subsetter(options)
        subsetter.populate(unicodes=icons)
        subsetter.subset(font)
        font.flavor = "woff2"
        out = BytesIO()
        font.save(out)
        name = f"icons-{Path(match[1]).stem}.woff2"
        (static / name).write_bytes(out.getvalue())
        return f'src:url("{versioned(name, out.getvalue())}") format("woff2")'

    return re.sub(r'src:url\("([^"]*/fa-[^"]*\.woff2)"\)[^;}]*', small, css)


def versioned(name: str, content: bytes) -> str:
    """A file's address, which changes with its content: browsers keep the old one otherwise."""
    return f"{name}?v={hashlib.sha256(content).hexdigest()[:8]}"


# ---------------------------------------------------------------------------------------------
# Pages


def size_of(png: Path) -> tuple[int, int] | None:
    """Width and height of a PNG, in pixels."""
    with png.open("rb") as stream:
        head = stream.read(24)
    return struct.unpack(">II", head[16:24]) if head[:4] == b"\x89PNG" else None


def with_sizes(html: str, page: Path) -> str:
    """The page with the size of each image, so that nothing jumps; all but the first load late.

    A wide one gets a box of its own, in which it scrolls on a phone (see custom.css).
    """
    seen = 0

    def sized(match: re.Match[str]) -> str:
        nonlocal seen
        seen += 1
        late = "lazy" if seen > 1 else "eager"
        size = None if "width=" in match[1] + match[3] else size_of(page.parent / match[2])
        width, height = size or (0, 0)
        sizes = f'width="{width}" height="{height}" ' if size else ""
        tag = f'<img {match[1]}src="{match[2]}"{match[3].rstrip(" /")} {sizes}loading="{late}">'
        if width <= WIDE:
            return tag
        return f'<span class="wide-figure" style="--natural-width: {width}px">{tag}</span>'

    return IMAGE.sub(sized, html)


def pages(root: Path) -> Iterator[Path]:
    """All pages below a folder; among the static files lie templates, which are none."""
    return (path for path in root.rglob("*.html") if "_static" not in path.parts)


def assets(html: str, pattern: re.Pattern[str]) -> list[str]:
    """The addresses of a page's own style sheets or scripts, in order."""
    return [m[1] for m in pattern.finditer(html) if "://" not in m[1]]


class Bundles:
    """The shared files of all pages, made of what the pages' heads name."""

    def __init__(self, root: Path) -> None:
        """Make them.

        Args:
            root: the folder of the pages, as just written.
        """
        self.static = root / "_static"
        index = (root / "genindex.html").read_text(encoding="utf-8")
        styles = assets(index, STYLE)
        scripts = [s for s in assets(index, SCRIPT) if not (SEARCH.search(s) or UNWANTED.search(s))]
        self.members = {
            "math.css": [name for name in styles if MATH.search(name)],
            "book.css": [name for name in styles if not MATH.search(name)],
            "book.js": [name for name in scripts if not CODE.search(name)],
            "code.js": [name for name in scripts if CODE.search(name)],
        }
        words = words_in(self._texts(root))
        for name, members in self.members.items():
            paths = [root / member for member in members]
            text = self._style(paths, words) if name.endswith("css") else self._script(paths)
            (self.static / name).write_text(text, encoding="utf-8")

    def _texts(self, root: Path) -> Iterator[str]:
        for path in (*pages(root), *self.static.glob("*.js")):
            yield path.read_text(encoding="utf-8")
        for name in ("bootstrap.js", "pydata-sphinx-theme.js", "sphinx-book-theme.js"):
            yield (self.static / "scripts" / name).read_text(encoding="utf-8")

    def _style(self, paths: list[Path], words: set[str]) -> str:
        text = "\n".join(inlined(path, self.static) for path in paths)
        rules = tinycss2.parse_stylesheet(text, skip_comments=True, skip_whitespace=True)
        names = ", ".join(path.relative_to(self.static).as_posix() for path in paths)
        small = with_few_icons(pruned(rules, words), self.static)
        return f'@charset "utf-8";\n/* Of {names}: what some page can use. */\n{small}'

    @staticmethod
    def _script(paths: list[Path]) -> str:
        texts = (path.read_text(encoding="utf-8") for path in paths)
        return "\n;\n".join(re.sub(r"//# sourceMappingURL=\S+", "", text) for text in texts)

    def put_into(self, html: str, up: str) -> str:
        """A page that asks for these in place of what they are made of.

        Args:
            html: the page as the theme wrote it.
            up: the way from the page to the folder of all pages, as `../`.
        """
        shared = {name for members in self.members.values() for name in members}

        def drop(match: re.Match[str]) -> str:
            address = match[1]
            name = address.removeprefix(up)
            if name in shared or UNWANTED.search(name):
                return ""
            if SEARCH.search(name) and 'id="search-results"' not in html:
                return ""
            if match.re is SCRIPT and " defer" not in match[0] and "://" not in address:
                return match[0].replace("<script ", "<script defer ", 1)
            return match[0]

        names = ["book.css", "book.js"]
        if USES_MATH in html:
            names.insert(0, "math.css")
        if USES_CODE.search(html):
            names.append("code.js")
        tags = [
            f'<link rel="stylesheet" href="{up}_static/{name}">'
            if name.endswith("css")
            else f'<script defer src="{up}_static/{name}"></script>'
            for name in names
        ]
        # Where the theme's first style sheet stood: what a page adds comes after it.
        place = STYLE.search(html).start()
        html = html[:place] + "\n".join(tags) + "\n" + html[place:]
        for pattern in (OPTIONS, PRELOAD):
            html = pattern.sub("", html)
        # The new tags are no members, so they stay.
        return SCRIPT.sub(drop, STYLE.sub(drop, html))


def with_versions(html: str, root: Path, seen: dict[str, str]) -> str:
    """The page with addresses of scripts and style sheets that change with their content."""

    def address(match: re.Match[str]) -> str:
        name = match[1]
        if name not in seen:
            path = root / "_static" / name
            seen[name] = versioned(name, path.read_bytes()) if path.is_file() else name
        return f'_static/{seen[name]}"'

    return re.sub(r'_static/([\w./-]+\.(?:css|js))(?:\?[^"]*)?"', address, html)


def lighten(root: Path) -> int:
    """Lighten the pages that a build has just written.

    Args:
        root: the folder of the pages.

    Returns:
        How many these were.  Pages of earlier builds only get new addresses.
    """
    index = root / "genindex.html"
    if not index.is_file() or "_static/book.css" in index.read_text(encoding="utf-8"):
        return 0  # Sphinx writes the index whenever it writes a page
    bundles = Bundles(root)
    seen: dict[str, str] = {}
    count = 0
    for page in pages(root):
        before = after = page.read_text(encoding="utf-8")
        if "_static/book.css" not in before and "_static/" in before:
            up = "../" * (len(page.relative_to(root).parts) - 1)
            after = with_sizes(bundles.put_into(after, up), page)
            count += 1
        after = with_versions(after, root, seen)
        if after != before:
            page.write_text(after, encoding="utf-8")
    return count


# ---------------------------------------------------------------------------------------------
# Sphinx


def digest_of(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(path.as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def outdated(app, env, added: set, changed: set, removed: set) -> Iterable[str]:
    """What to write again when no page changed, but what pages are made with: Sphinx does not ask.

    A changed extension or template may touch every page.  A changed script or style sheet needs one
    page, for it is copied, and its address renewed, whenever any is written.
    """
    book = Path(app.srcdir) / "book"
    made_with = digest_of(p for name in ("_ext", "_templates") for p in (book / name).rglob("*"))
    assets = digest_of((book / "assets").rglob("*"))
    before = getattr(env, "made_with", (made_with, assets))
    env.made_with = made_with, assets
    if before[0] != made_with:
        return env.found_docs
    return [app.config.root_doc] if before[1] != assets else []


def finish(app, exception: Exception | None) -> None:
    if exception is None and app.builder.format == "html":
        lighten(Path(app.outdir))


def setup(app):
    app.connect("env-get-outdated", outdated)
    app.connect("build-finished", finish, priority=900)  # after all that reads the pages' heads
    return {"parallel_read_safe": True, "parallel_write_safe": True}
