"""What is taken out of the finished pages, and what is left in."""

import re
import struct

import pytest
import tinycss2
from fontTools.ttLib import TTFont

import light_pages
from fresh import ROOT

HEAD = """<html><head>
  <link href="{up}_static/styles/theme.css?digest=1" rel="stylesheet" />
    <link rel="stylesheet" type="text/css" href="{up}_static/katex/katex.min.css?v=1" />
    <link rel="stylesheet" type="text/css" href="{up}_static/print.css?v=1" media="print" />
    <link rel="stylesheet" type="text/css" href="{up}_static/custom.css?v=1" />
  <link rel="preload" as="script" href="{up}_static/scripts/bootstrap.js?digest=1" />
    <script src="{up}_static/doctools.js?v=1"></script>
    <script src="{up}_static/clipboard.min.js?v=1"></script>
    <script>DOCUMENTATION_OPTIONS.pagename = 'page';</script>
    <script>let toggleHintShow = 'Click to show';</script>
    <script src="{up}_static/searchtools.js"></script>
    <script src="{up}searchindex.js"></script>
  </head><body>{body}
  <script defer src="{up}_static/scripts/bootstrap.js?digest=1"></script>
  <script defer src="{up}_static/scripts/fontawesome.js?digest=1"></script>
  </body></html>"""


@pytest.fixture
def site(tmp_path):
    """A folder of pages as the theme writes them; its two fonts are real ones."""
    files = {
        "styles/theme.css": '@import "../basic.css";',
        "basic.css": ".used{background:url(file.png)} .unused{color:red} #main{color:blue}",
        "katex/katex.min.css": ".katex{src:url(fonts/x.woff2)}",
        "custom.css": ".used:not(.unused), .other .used { color: green } @media (min-width:1px)"
        "{ .unused{top:0} .used{top:1px} } @media print { .unused{top:0} }",
        "print.css": ".used{color:black}",
        "doctools.js": "const doctools = 1; //# sourceMappingURL=doctools.js.map",
        "clipboard.min.js": "const clipboard = 1",
        "searchtools.js": "const search = 1",
        "scripts/bootstrap.js": "const bootstrap = 1",
        "scripts/fontawesome.js": "const icons = 1",
        "scripts/pydata-sphinx-theme.js": "",
        "scripts/sphinx-book-theme.js": "",
        "own.js": "const own = 1",
    }
    for name, text in files.items():
        path = tmp_path / "_static" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    bodies = {
        "genindex.html": '<p class="used" id="main">',
        "search.html": '<div id="search-results">',
        "book/math.html": '<span class="katex">x</span><script src="../_static/own.js"></script>',
        "notebooks/code.html": '<div class="highlight-python">',
        "book/folded.html": '<div class="solution dropdown admonition">',
    }
    for name, body in bodies.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(HEAD.format(up="../" * name.count("/"), body=body))
    return tmp_path


def asked_for(page):
    return re.findall(r'(?:src|href)="(?:\.\./)*([^"?]+)', page.read_text())


def test_each_page_asks_for_what_it_uses(site):
    assert light_pages.lighten(site) == 5
    shared = ["_static/book.css", "_static/book.js"]
    assert asked_for(site / "genindex.html") == [*shared, "_static/print.css"]
    assert asked_for(site / "search.html") == [
        *shared,
        "_static/print.css",
        "_static/searchtools.js",
        "searchindex.js",
    ]
    assert asked_for(site / "book" / "math.html") == [
        "_static/math.css",
        *shared,
        "_static/print.css",
        "_static/own.js",
    ]
    code = [*shared, "_static/code.js", "_static/print.css"]
    assert asked_for(site / "notebooks" / "code.html") == code
    assert asked_for(site / "book" / "folded.html") == code


def test_no_script_holds_up_a_page(site):
    light_pages.lighten(site)
    for page in light_pages.pages(site):
        for script in re.findall(r"<script [^>]*src=[^>]*>", page.read_text()):
            assert " defer" in script


def test_options_for_a_script_that_comes_later_are_gone_and_others_stay(site):
    light_pages.lighten(site)
    html = (site / "search.html").read_text()
    assert "DOCUMENTATION_OPTIONS" not in html
    assert "toggleHintShow" in html


def test_the_style_sheet_keeps_what_some_page_can_match(site):
    light_pages.lighten(site)
    css = (site / "_static" / "book.css").read_text()
    assert 'url("file.png")' in css
    assert "#main{color:blue}" in css
    assert ".used:not(.unused){color: green}" in css  # no page has `other`
    assert "@media (min-width:1px){.used{top:1px}}" in css
    assert ".unused{" not in css
    assert "@media print" not in css
    assert 'url("katex/fonts/x.woff2")' in (site / "_static" / "math.css").read_text()


def test_scripts_stand_one_after_the_other(site):
    light_pages.lighten(site)
    js = (site / "_static" / "book.js").read_text()
    assert js.index("doctools") < js.index("bootstrap")
    assert "sourceMappingURL" not in js
    assert "search" not in js


def test_a_second_pass_changes_nothing(site):
    light_pages.lighten(site)
    before = {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}
    assert light_pages.lighten(site) == 0
    assert before == {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}


def test_old_pages_get_the_addresses_of_new_files(site):
    light_pages.lighten(site)
    old = (site / "book" / "math.html").read_text()
    (site / "_static" / "own.js").write_text("const own = 2")
    (site / "_static" / "custom.css").write_text(".used{color:black}")
    (site / "genindex.html").write_text(HEAD.format(up="", body='<p class="used">'))  # a new build
    assert light_pages.lighten(site) == 1
    new = (site / "book" / "math.html").read_text()
    address = re.compile(r"_static/((?:own|book)\.\w+)\?v=(\w+)")
    before, after = dict(address.findall(old)), dict(address.findall(new))
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"own.js", "book.css"}
    assert after["book.js"] == before["book.js"]


@pytest.mark.parametrize("path", sorted((ROOT / "book" / "assets").glob("*.css")))
def test_every_rule_of_the_book_s_own_is_closed(path):
    text = path.read_text()  # of an open one, browsers take all that follows to be a part
    assert text.count("{") == text.count("}")


@pytest.mark.parametrize(
    ("selector", "kept"),
    [
        (".a", True),
        (".b", False),
        ("p.a > #c", True),
        ("p.a > #d", False),
        (".a:not(.b)", True),
        ("html[data-theme=dark]", True),
        ("*", True),
    ],
)
def test_a_selector_is_used_when_all_its_classes_and_ids_are(selector, kept):
    tokens = tinycss2.parse_component_value_list(selector)
    assert light_pages.used(tokens, {"a", "c"}) is kept


def test_a_font_of_icons_holds_those_that_are_drawn(tmp_path):
    from pydata_sphinx_theme import __file__ as theme

    fonts = next((ROOT / theme).parent.rglob("fa-solid-900.woff2")).parent
    (tmp_path / "fonts").mkdir()
    whole = fonts / "fa-solid-900.woff2"
    (tmp_path / "fonts" / whole.name).write_bytes(whole.read_bytes())
    face = '@font-face{src:url("fonts/fa-solid-900.woff2") format("woff2")}'
    css = light_pages.with_few_icons('.x::before{content:"\uf135"}' + face, tmp_path)
    small = tmp_path / re.search(r'url\("([^"?]+)', css)[1]
    assert set(TTFont(small).getBestCmap()) == {0xF135}
    assert small.stat().st_size < whole.stat().st_size / 50


def test_a_wide_image_has_a_box_to_scroll_in(tmp_path):
    (tmp_path / "_images").mkdir()
    png = b"\x89PNG\r\n\x1a\n" + bytes(8) + struct.pack(">II", 900, 480)
    (tmp_path / "_images" / "a.png").write_bytes(png)
    sized = light_pages.with_sizes('<img alt="A" src="_images/a.png">', tmp_path / "page.html")
    assert sized.startswith('<span class="wide-figure" style="--natural-width: 900px"><img alt="A"')


def test_an_image_says_how_large_it_is_and_all_but_the_first_wait(tmp_path):
    (tmp_path / "_images").mkdir()
    (tmp_path / "_images" / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + bytes(8) + struct.pack(">II", 600, 480)
    )
    html = '<img alt="A" src="_images/a.png" />' * 2 + '<img width="9" src="_images/b.svg">'
    sized = light_pages.with_sizes(html, tmp_path / "page.html")
    assert sized == (
        '<img alt="A" src="_images/a.png" width="600" height="480" loading="eager">'
        '<img alt="A" src="_images/a.png" width="600" height="480" loading="lazy">'
        '<img width="9" src="_images/b.svg" loading="lazy">'
    )
    assert light_pages.with_sizes(sized, tmp_path / "page.html") == sized
