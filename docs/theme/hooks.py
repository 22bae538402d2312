"""What the site needs beside mkdocs' plugins: pages and pictures from outside docs/, MathML, the command line's help.

The Markdown files work on GitHub as they are. On the site, a link from them to a page of the site leads there, a
picture is copied, and a link to any other file of the repository becomes the file's path: no public address is known.
"""

import contextlib
import io
import os
import re
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
#: pages of the site that lie elsewhere in the repository
PAGES = {"kernels/README.md": "kernels.md", "benchmarks/results/README.md": "results.md"}
FENCE = r"^(?P<indent> *)(?P<fence>```+)(?P<info>[^\n]*)\n.*?^(?P=indent)(?P=fence)$"
LINK = r"(?P<picture>!?)\[(?P<text>[^\]\[]*(?:\[[^\]\[]*\][^\]\[]*)*)\]\((?P<target>[^)\s]+)\)"
FENCE_OR_LINK = re.compile(f"{FENCE}|{LINK}", re.MULTILINE | re.DOTALL)
COMMANDS = "<!-- commands -->"
FUNCTION = r"(?:<mi>(?:log|exp|tanh|sin|cos)</mi>|<msup><mi>(?:log|exp|tanh)</mi>.{1,40}?</msup>)"
BAR = "&#124;"
SPACE = '<mspace width="0.167em" />'


def on_files(files, config):
    """Add the pages and the pictures that lie outside docs/."""
    for source, place in PAGES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    pictures = set()
    for page in files.documentation_pages():
        for match in FENCE_OR_LINK.finditer(page.content_string):
            path = _repository_path(page, match["target"] or "")
            if match["picture"] and path and not path.startswith("docs/"):
                pictures.add(path)
    for path in sorted(pictures):
        files.append(File.generated(config, f"pictures/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrite links, and put in what is made from the code."""
    if COMMANDS in markdown:
        if not (sections := list(_commands())):
            raise PluginError("no commands were found in fastsac --help")
        markdown = markdown.replace(COMMANDS, "\n\n".join(sections))
    return FENCE_OR_LINK.sub(lambda match: _rewritten(match, page.file), markdown)


def on_page_content(html, page, config, files):
    """Make MathML of LaTeX, and put SVG pictures into the page, where they take its colours."""
    html = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', lambda m: _mathml(m[1], "inline"), html, flags=re.S)
    html = re.sub(
        r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>',
        lambda m: f'<div class="formula">{_mathml(m[1], "block")}</div>',
        html,
        flags=re.S,
    )
    if "arithmatex" in html:
        raise PluginError(f"{page.file.src_uri}: a formula was not made into MathML")
    parts = re.split(r"(<pre.*?</pre>)", html, flags=re.S)  # a block scrolls, and breaks nowhere
    parts[::2] = [re.sub(r"<code>[^<]*</code>", lambda m: _breakable(m[0]), part) for part in parts[::2]]
    html = "".join(parts)
    html = re.sub(r'<img [^>]*src="([^"]+\.svg)"[^>]*>', lambda m: _svg(page.file, m[1]), html)
    return html.replace("::</p>", ":</p>")  # docstrings announce code that way


def on_post_build(config):
    """Refuse a site that needs the network to be read."""
    away = r"""["']?(?:https?:)?//"""
    taken = rf"<(?:script|img|iframe|source)[^>]*\ssrc={away}|<link[^>]*\shref={away}|url\({away}|@import\s*{away}"
    for path in [*Path(config.site_dir).rglob("*.html"), *Path(config.site_dir).rglob("*.css")]:
        text = path.read_text(encoding="utf-8")
        if found := re.search(taken, text):
            raise PluginError(f"{path} takes something from the network: {text[found.start() :][:120]}")


def _repository_path(file, target):
    """Return the path, from the repository's root, that a page's link leads to; None for links of another kind."""
    path, *_ = target.partition("#")
    if not path or re.match(r"\w+:", path):
        return None
    return os.path.relpath((Path(file.abs_src_path).parent / path).resolve(), ROOT)


def _rewritten(match, file):
    if match["fence"]:  # words behind the language are for the tests
        language, *_ = match["info"].split() or [""]
        begin = match.start("info") - match.start()
        return match[0][:begin] + language + match[0][begin + len(match["info"]) :]
    path = _repository_path(file, match["target"])
    if path is None:
        return match[0]
    if not (ROOT / path).exists():
        raise PluginError(f"{file.src_uri}: {match['target']} leads nowhere")
    anchor = "".join(match["target"].partition("#")[1:])
    here = Path(file.src_uri).parent
    if match["picture"]:
        place = path.removeprefix("docs/") if path.startswith("docs/") else f"pictures/{path}"
        return f"![{match['text']}]({os.path.relpath(place, here)})"
    if path.startswith("docs/") or path in PAGES:
        place = PAGES.get(path) or path.removeprefix("docs/")
        return f"[{match['text']}]({os.path.relpath(place, here)}{anchor})"
    name = match["text"].strip("`")
    return f"`{path}`" if path.endswith(name) else f"{match['text']} (`{path}`)"


def _mathml(latex, display):
    """Return MathML, with what the converter leaves out: `aligned`, and the spaces around log, tanh and the like."""
    mathml = convert(unescape(latex).strip().replace("{aligned}", "{align*}"), display=display)
    if re.search(r"<mi>(&|\\\\?\w{2,})</mi>", mathml):
        raise PluginError(f"a formula was not understood: {latex}")
    mathml = re.sub(rf"{FUNCTION}(?!<mo stretchy=.false.>&#x00028;|<mrow><mo stretchy)", rf"\g<0>{SPACE}", mathml)
    return re.sub(rf"(?<=</mi>|</mn>|msub>){FUNCTION}", rf"{SPACE}\g<0>", mathml)


def _breakable(code):
    """Let a narrow screen break code behind slashes and double colons, and not behind the hyphens of an option."""
    whole = re.sub(r"(?<=[ >(])(?=[^ <]*-)[\w-]{2,28}(?=[ <)])", r'<span class="whole">\g<0></span>', code)
    return re.sub(r"(::|/)(?=\w)(?!code>|span>)", r"\1<wbr>", whole)


def _svg(file, source):
    svg = (Path(file.abs_src_path).parent / source).read_text(encoding="utf-8")
    return svg[svg.index("<svg") :]


def _commands():
    """Return a section for each command, from its --help."""
    for command in _subcommands([]):
        yield _section([command])
        for each in _subcommands([command]):
            yield _section([command, each])


def _subcommands(words):
    return re.findall(r"^│   • (\S+)", _help(words), flags=re.MULTILINE)


def _section(words):
    text = _help(words)
    usage, about = text.split("\n\n")[:2]
    lines = [f"## `fastsac {' '.join(words)}`", "", "```text", usage.strip(), "```", "", about.strip(), ""]
    for title, box in re.findall(r"^╭─ (.*?) ─+╮\n(.*?)^╰", text, flags=re.MULTILINE | re.DOTALL):
        if title == "subcommands":
            continue
        if title not in ("options", "positional arguments"):
            lines += [f"### {title} of `fastsac {' '.join(words)}`", ""]
        options = []
        for line in re.sub(r"\A.*^│ ─+ *│$", "", box, flags=re.MULTILINE | re.DOTALL).splitlines():
            cell = line.strip("│").rstrip()
            if match := re.match(r" (\S.*?)(?:\s{2,}(\S.*))?$", cell):
                options.append([match[1], match[2] or ""])
            elif cell:
                options[-1][1] += " " + cell.strip()
        lines += ["| | |", "|---|---|"]
        lines += [_row(name, text) for name, text in options if name != "-h, --help"]
        lines.append("")
    return "\n".join(lines)


def _row(name, text):
    """Return an option and what it does; the values that it takes come in front of the text, where there is room."""
    option, _, values = name.partition(" ") if " --no-" not in name else (name, "", "")
    values = values.replace("{None}|", "").replace("|", " or ").replace(",", ", ")
    text = re.sub(r"\(default: (None)?\)", "", text).strip()
    text = re.sub(r"(?<![`\w-])(--[a-z][a-z-]*)(?![`\w-])", r"`\1`", text)
    cells = f"`{option}`", f"`{values}` {text}" if values else text
    return f"| {' | '.join(cell.replace('|', BAR).replace('<', '&lt;') for cell in cells)} |"


def _help(words):
    from fastsac.arguments import parse

    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)  # else the boxes are drawn otherwise
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "200"
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            parse([*words, "--help"])
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    return re.sub(r"\x1b\[[0-9;]*m", "", printed.buffer.getvalue().decode())
