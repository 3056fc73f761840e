"""Notebooks in and out, with what JupyterLab already installs (nbformat, nbclient, nbconvert).

    python tools/book.py text NB [FILE]           notebook -> percent script (to FILE or the terminal), outputs left behind
    python tools/book.py write FILE NB            percent script -> notebook; cells that did not change keep their outputs
    python tools/book.py run [NB ...]             execute in place, keep still outputs only, clean
    python tools/book.py readme                   nbs/index.ipynb -> README.md
    python tools/book.py site                     nbs/**/*.ipynb -> _docs/**/*.html
"""
import hashlib, html, json, os, re, shutil, sys
from pathlib import Path
import nbformat

ROOT = Path(__file__).resolve().parents[1]; NBS = ROOT/"nbs"; OUT = ROOT/"_docs"
WIDGET = "application/vnd.jupyter.widget-view+json"


def notebooks():
    "Every notebook of the book, in reading order."
    return sorted(p for p in NBS.rglob("*.ipynb") if not any(o.startswith(("_", ".")) for o in p.relative_to(NBS).parts))


def _flags():
    from nbdev.config import get_config
    flags = "|".join(get_config(path=ROOT).tst_flags.split())
    return re.compile(rf"^#\|\s*({flags})\s*$|^#\|\s*eval:\s*false", re.M)


def text(nb, out=None):
    "Notebook to percent script: `# %%` before a code cell, `# %% [markdown]` before a text cell whose lines are bare."
    cells = nbformat.read(nb, as_version=4).cells
    body = "\n\n".join(("# %% [markdown]\n" if c.cell_type == "markdown" else "# %%\n") + c.source for c in cells) + "\n"
    Path(out).write_text(body, encoding="utf-8") if out else print(body, end="")


def _ids(cells):
    "Ids that do not change when a cell moves: the first symbol that an exported cell defines, else a hash of its text."
    seen = {}
    for c in cells:
        name = re.search(r"^(?:class|def)\s+(\w+)", c.source, re.M) if re.search(r"^#\|\s*export", c.source, re.M) else None
        base = name.group(1).lower()[:40].replace("_", "-").strip("-") if name else hashlib.sha1(c.source.encode()).hexdigest()[:8]
        n = seen[base] = seen.get(base, 0) + 1
        c["id"] = base if n == 1 else f"{base}-{n}"


def write(src, nb):
    "Percent script to notebook. Text cells are written bare (no leading `# `)."
    parts = re.split(r"^# %%(.*)\n", Path(src).read_text(encoding="utf-8"), flags=re.M)[1:]
    cells = [(nbformat.v4.new_markdown_cell if "[markdown]" in kind else nbformat.v4.new_code_cell)(body.strip("\n"))
             for kind, body in zip(parts[::2], parts[1::2]) if body.strip()]
    _ids(cells)
    nb = Path(nb)
    old = {c.source: c for c in nbformat.read(nb, as_version=4).cells if c.cell_type == "code"} if nb.exists() else {}
    for c in cells:
        if c.cell_type == "code" and c.source in old: c.outputs = old[c.source].outputs
    nb.parent.mkdir(parents=True, exist_ok=True)
    meta = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    _save(nbformat.v4.new_notebook(cells=cells, metadata=meta), nb)


def _save(book, path):
    "nbdev_clean's own byte form, so that cleaning afterwards changes nothing."
    from nbdev.clean import clean_nb
    from execnb.nbio import nb2str, dict2nb
    book = dict2nb(json.loads(nbformat.writes(book, split_lines=True)))
    clean_nb(book, clear_all=False, allowed_metadata_keys=[], allowed_cell_metadata_keys=["tags"])
    path.write_text(nb2str(book), encoding="utf-8")


def run(path):
    "Execute a notebook in place; cells flagged slow, gpu or `eval: false` keep the outputs that they have."
    from nbclient import NotebookClient
    flag = _flags()
    nb = nbformat.read(path, as_version=4)
    keep = {i: c for i, c in enumerate(nb.cells) if c.cell_type == "code" and flag.search(c.source)}
    todo = nbformat.from_dict({**nb, "cells": [nbformat.v4.new_raw_cell(c.source, id=c.id) if i in keep else c for i, c in enumerate(nb.cells)]})
    NotebookClient(todo, timeout=1200, kernel_name="python3", record_timing=False,
                   resources={"metadata": {"path": str(path.parent)}}).execute()
    for i, c in enumerate(todo.cells):
        if i in keep: todo.cells[i] = keep[i]
        elif c.cell_type == "code": c.outputs = _still(c.outputs)
    todo.metadata.pop("widgets", None); todo.metadata.pop("language_info", None)
    _save(todo, path)


def _still(outputs):
    "Outputs without widgets; progress output on stderr is dropped, pieces of one stream are joined."
    out = []
    for o in outputs:
        if WIDGET in o.get("data", {}) or o.get("name") == "stderr": continue
        if out and o.output_type == "stream" and out[-1].output_type == "stream": out[-1].text += o.text
        else: out.append(o)
    return out


def _hidden(nb):
    "Drop `#| hide` cells and nbdev's directive lines."
    nb.cells = [c for c in nb.cells if not re.search(r"^#\|\s*(hide|default_exp)", c.source, re.M)]
    for c in nb.cells: c.source = re.sub(r"^#\|.*\n?", "", c.source, flags=re.M)
    return nb


def readme():
    "nbs/index.ipynb to README.md; pictures go beside it into nbs/images/."
    from nbconvert import MarkdownExporter
    body, res = MarkdownExporter().from_notebook_node(_hidden(nbformat.read(NBS/"index.ipynb", as_version=4)))
    for name, data in (res.get("outputs") or {}).items():
        (NBS/"images").mkdir(exist_ok=True); (NBS/"images"/name).write_bytes(data)
        body = body.replace(f"({name})", f"(nbs/images/{name})")
    head = "<!-- Made from nbs/index.ipynb by `make readme`: do not edit -->\n\n"
    (ROOT/"README.md").write_text(head + re.sub(r"\n{3,}", "\n\n", body).strip() + "\n", encoding="utf-8")


def _title(nb, p): return next((l[2:] for c in nb.cells if c.cell_type == "markdown" for l in c.source.splitlines() if l.startswith("# ")), p.stem)


def _nav(pages, here):
    "The list of all pages as links, grouped by chapter."
    out, chapter = [], None
    for p, nb in pages:
        d = p.parent.relative_to(NBS).as_posix()
        if d != chapter and d != ".": out.append(f"<h3>{html.escape(d.replace('_', ' '))}</h3>")
        chapter, target = d, (OUT/p.relative_to(NBS)).with_suffix(".html")
        mark = " aria-current=page" if p == here else ""
        out.append(f'<a href="{os.path.relpath(target, (OUT/here.relative_to(NBS)).parent)}"{mark}>{html.escape(_title(nb, p))}</a>')
    return "\n".join(out)


def site():
    "Every notebook as a static page; nothing is fetched from elsewhere."
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter
    shutil.rmtree(OUT, ignore_errors=True)
    pages = [(p, _hidden(nbformat.read(p, as_version=4))) for p in notebooks()]
    pages.sort(key=lambda o: (o[0].name != "index.ipynb", o[0].as_posix()))
    export = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    css = HtmlFormatter(style="default").get_style_defs(".highlight") + CSS
    for p, nb in pages:
        body, _ = export.from_notebook_node(nb)
        body = re.sub(r'href="([^":]+)\.ipynb(#[^"]*)?"', r'href="\1.html\2"', body)
        dst = (OUT/p.relative_to(NBS)).with_suffix(".html"); dst.parent.mkdir(parents=True, exist_ok=True)
        dst.write_text(PAGE.format(title=html.escape(_title(nb, p)), css=css, nav=_nav(pages, p), body=body), encoding="utf-8")
    print(f"{len(pages)} pages in {OUT}")


CSS = """
body{margin:0;display:grid;grid-template-columns:17rem minmax(0,54rem);gap:2rem;font:16px/1.55 system-ui,sans-serif;color:#222}
nav{position:sticky;top:0;height:100vh;overflow:auto;padding:1rem;box-sizing:border-box;background:#f6f7f9;border-right:1px solid #ddd}
nav a{display:block;padding:.15rem .4rem;color:#234;text-decoration:none;border-radius:4px}nav a[aria-current]{background:#dbe6ff}nav h3{margin:.8rem 0 .2rem;font-size:.8rem;text-transform:uppercase;color:#667}
main{padding:1rem 1rem 4rem}img{max-width:100%}pre{overflow-x:auto;margin:0;font-size:.85rem;line-height:1.4}
.jp-InputPrompt,.jp-OutputPrompt,.jp-Collapser,.anchor-link,.jp-InputArea-prompt,.jp-OutputArea-prompt{display:none}
.highlight{background:#f7f7f9;border:1px solid #e3e3e8;border-radius:6px;padding:.5rem .8rem;margin:.6rem 0}blockquote{margin:0;padding-left:1rem;border-left:3px solid #9bb;color:#555}
table{border-collapse:collapse}td,th{border:1px solid #ddd;padding:.2rem .5rem}@media(max-width:50rem){body{display:block}nav{position:static;height:auto}}"""
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><title>{title}</title><style>{css}</style></head>
<body><nav>{nav}</nav><main>{body}</main></body></html>"""

if __name__ == "__main__":
    cmd, args = (sys.argv[1:2] or ["help"])[0], sys.argv[2:]
    if cmd == "run":
        for p in [Path(a).resolve() for a in args] or notebooks(): print("run", p.relative_to(ROOT), flush=True); run(p)
    elif cmd in ("text", "write", "readme", "site"): globals()[cmd](*args)
    else: sys.exit(__doc__)
