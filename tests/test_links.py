"""The check of links: broken ones inside the book, and addresses of other hosts."""

from __future__ import annotations

import http.server
import json
import threading

import nbformat
import pytest

import links


def page(folder, text):
    path = folder / "page.md"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_books_own_links_lead_somewhere():
    pages = links.files(links.ROOT)
    assert len(pages) > 50
    assert {path: links.broken(path) for path in pages if links.broken(path)} == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](there.md), [b](there.md#part), ![c](a%20picture.png), [d](#part)", []),
        ("[a](gone.md)", ["gone.md"]),
        ("![a](gone.png)", ["gone.png"]),
        ("```{note}\n[a](gone.md#part)\n```", ["gone.md#part"]),
        ("````{tab}\n```{note}\n[a](gone.md)\n```\n````", ["gone.md"]),
        ("```python\nx = [a](gone.md)\n```\n`[a](gone.md)`", []),
        ("[a](https://example.org/gone.md), <mailto:a@example.org>", []),
    ],
)
def test_links_to_files_that_are_not_there(tmp_path, text, expected):
    (tmp_path / "there.md").touch()
    (tmp_path / "a picture.png").touch()
    assert links.broken(page(tmp_path, text)) == expected


def test_a_notebooks_markdown_is_read_and_its_code_is_not(tmp_path):
    cells = [
        nbformat.v4.new_markdown_cell("[a](gone.ipynb)"),
        nbformat.v4.new_code_cell("# [b](also_gone.ipynb) https://a.org"),
    ]
    path = tmp_path / "one.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    assert links.broken(path) == ["gone.ipynb"]
    assert links.addresses(links.text_of(path)) == set()
    assert links.addresses(links.text_of(path, code=True)) == {"https://a.org"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see (https://a.org/b).", {"https://a.org/b"}),
        ("https://a.org/b_(c), and more", {"https://a.org/b_(c)"}),
        ("[https://a.org](https://a.org/b)", {"https://a.org"}),
        ("pip install git+https://a.org/b", {"https://a.org/b"}),
        ('url = {https://a.org}, href="https://b.org/"', {"https://a.org", "https://b.org/"}),
        ("doi = {10.1/x},\n  eprint = {1211.5063},",
         {"https://doi.org/10.1/x", "https://arxiv.org/abs/1211.5063"}),
        ("https://... http://localhost:80 http://127.0.0.1/ f'https://{host}/'", set()),
    ],
)  # fmt: skip
def test_addresses_in_a_text(text, expected):
    assert links.addresses(text) == expected


def test_what_linkcheck_found_is_sorted_by_what_there_is_to_do():
    records = [
        {"status": "working", "code": 200, "uri": "a", "info": ""},
        {"status": "redirected", "code": 301, "uri": "b", "info": "https://new.org"},
        {"status": "broken", "code": 0, "uri": "c", "info": "404 Client Error: Not Found"},
        {"status": "broken", "code": 0, "uri": "d", "info": "403 Client Error: Forbidden"},
        {"status": "timeout", "code": 0, "uri": "e", "info": "timed out"},
    ]
    found = links.verdicts("\n".join(map(json.dumps, records)))
    kinds = {address: kind for address, (kind, _) in found.items()}
    expected = ["fine", "moved", "broken", "turned away", "broken"]
    assert kinds == dict(zip("abcde", expected, strict=True))
    assert found["b"][1] == "301 https://new.org"


class Host(http.server.BaseHTTPRequestHandler):
    """A host that has one page, and turns programs away from another."""

    def do_HEAD(self):
        self.send_response({"/there": 200, "/closed": 403}.get(self.path, 404))
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


def test_linkcheck_asks_and_a_broken_link_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(links, "is_public", lambda address: True)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"http://127.0.0.1:{server.server_port}"
    try:
        assert links.check_outside([page(tmp_path, f"<{host}/there> <{host}/closed>")]) == 0
        said = capsys.readouterr().out
        assert "0 broken" in said
        assert f"1 turned away:\n  {host}/closed" in said
        assert links.check_outside([page(tmp_path, f"<{host}/there> <{host}/gone>")]) == 1
        said = capsys.readouterr().out
        assert f"1 broken:\n  {host}/gone\n    in {tmp_path / 'page.md'}: 404" in said
        assert f"{host}/there" not in said
    finally:
        server.shutdown()
        server.server_close()
