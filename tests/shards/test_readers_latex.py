"""LaTeX sources to text: what a paper says stays, in order; what sets it is gone; mathematics is untouched."""

from __future__ import annotations

import gzip
import io
import tarfile
import time
from pathlib import Path

import pytest

from shards.readers.sources import Rejected, read_unit, units
from shards.readers.texlexer import lexed
from shards.spec import Source
from shards.tokenization.records import Document

MAIN = r"""\documentclass[11pt]{article}
% a comment with \section{Nothing}
\usepackage[utf8]{inputenc}
\newcommand{\R}{\mathbb{R}}
\newcommand{\norm}[1]{\left\lVert #1 \right\rVert}
\newcommand{\pair}[2][x]{\langle #1, #2 \rangle}
\def\eps{\varepsilon}
\DeclareMathOperator{\argmin}{arg\,min}
\newcommand{\ours}{\textsc{Watch}}
\title{On \ours{} and \\ other things\thanks{Funded.}}
\author{A. Author}
\begin{document}
\maketitle
\begin{abstract}
We show that $\norm{x} \in \R$ for $\eps > 0$.
\end{abstract}
\input{sections/intro}
\section{Method}\label{sec:m}
As shown by~\cite{knuth}, 50\% of G\"odel's \emph{na\"{\i}ve} work --- see Section~\ref{sec:m} (\cite[p.~3]{x}) ---
is ``done''.% trailing
\begin{equation}\label{eq:a}
  \argmin_x \norm{x}^2 + \pair{y} + \pair[z]{y}   % in maths
\end{equation}
\begin{itemize}
\item First, {\bf bold} and \texttt{code\_name}.
\item[Second] \href{http://x.y}{a link} \url{http://a.b/c_d}.
\end{itemize}
\begin{figure}[ht]
\includegraphics[width=3cm]{fig.pdf}
\caption{The \ours{} loop.}
\end{figure}
\begin{table}\begin{tabular}{ll} a & b \\ c & d \end{tabular}\caption{Numbers.}\end{table}
\begin{verbatim}
x = 5 % not a comment
\end{verbatim}
Cost is \$5\footnote{In 2024.} for \verb|a%b_c|.
\subsection*{Na\-ming}
Erd\H{o}s and \L{}ukasiewicz, Stra\ss e.
\bibliographystyle{plain}
\bibliography{refs}
\begin{thebibliography}{9}\bibitem{x} Someone. \end{thebibliography}
\end{document}
Never seen.
"""
INTRO = "\\section{Introduction}\nHello % gone\nworld.\n\nA new paragraph.\n"
TEXT = r"""# On Watch and other things

## Abstract

We show that $\left\lVert x \right\rVert \in \mathbb{R}$ for $\varepsilon > 0$.

## Introduction

Hello
world.

A new paragraph.

## Method

As shown by, 50% of Gödel's naïve work — see Section  —
is "done".
\begin{equation}
\operatorname{arg\,min}_x \left\lVert x \right\rVert^2 + \langle x, y \rangle + \langle z, y \rangle
\end{equation}

- First, bold and code_name.
- Second a link http://a.b/c_d.

The Watch loop.

Numbers.

```
x = 5 % not a comment
```
Cost is $5 (In 2024.) for `a%b_c`.

### Naming

Erdős and Łukasiewicz, Straße.
"""


def read(path: Path) -> tuple[list[Document], list[Rejected]]:
    source = Source(name="own", kind="text", origin="latex", path=str(path))
    records = [record for unit in units(source) for record in read_unit(source, unit)]
    return [each for each in records if isinstance(each, Document)], [each for each in records if isinstance(each, Rejected)]


def archive(files: dict[str, str]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return packed.getvalue()


def squeezed(text: str) -> str:
    return "\n".join(" ".join(line.split()) for line in text.split("\n"))


def test_a_paper_from_a_tree_and_from_an_archive_is_the_same_text(tmp_path: Path) -> None:
    (tmp_path / "tree/paper/sections").mkdir(parents=True)
    (tmp_path / "tree/paper/main.tex").write_text(MAIN)
    (tmp_path / "tree/paper/sections/intro.tex").write_text(INTRO)
    (tmp_path / "arxiv").mkdir()
    (tmp_path / "arxiv/2401.00001.tar.gz").write_bytes(
        archive({"main.tex": MAIN, "./sections/intro.tex": INTRO, "fig.pdf": "%PDF"})
    )
    for root in ("tree", "arxiv"):
        found, rejected = read(tmp_path / root)
        assert rejected == [] and len(found) == 1
        assert squeezed(found[0].parts[0]) == squeezed(TEXT)


def test_a_gz_is_one_file_or_an_archive_and_damage_is_told(tmp_path: Path) -> None:
    (tmp_path / "2401.00001v2.gz").write_bytes(gzip.compress(b"\\documentclass{article}\\begin{document}One.\\end{document}"))
    (tmp_path / "2401.00002.gz").write_bytes(archive({"p.tex": "\\documentclass{a}\\begin{document}Two.\\end{document}"}))
    (tmp_path / "2401.00003.gz").write_bytes(archive({"a.tex": "no class", "b.tex": "none"}))
    (tmp_path / "2401.00004.gz").write_bytes(gzip.compress(b"\\documentclass{article}" * 99)[:-9])
    (tmp_path / "ignored.csv.gz").write_bytes(gzip.compress(b"a,b"))
    found, rejected = read(tmp_path)
    assert [each.parts[0] for each in found] == ["One.\n", "Two.\n"]
    assert [(each.reason, each.rest) for each in rejected] == [
        ("no file with a document class", False),
        ("damaged file, read up to there", True),
    ]


def test_several_main_files_are_several_documents_and_included_ones_are_none(tmp_path: Path) -> None:
    for name, body in (("a", "A \\input{c}"), ("b", "B"), ("c", "shared")):
        head = "" if name == "c" else "\\documentclass{article}\\begin{document}"
        (tmp_path / f"{name}.tex").write_text(head + body)
    found, _ = read(tmp_path)
    assert [each.parts[0] for each in found] == ["A shared\n", "B\n"]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("a \\$ b $x_1$ c", "a $ b $x_1$ c"),
        ("open $x and on", "open $x and on"),
        ("\\unknown{kept} \\other[opt]{too}", "kept too"),
        ("line\\\\[2pt]next", "line\nnext"),
        ("\\'e \\`{a} \\c{c} \\v s \\o \\\"{\\i}", "é à ç š øï"),
        ("{unclosed \\section{Head} text", "unclosed\n\n## Head\n\ntext"),
        ("\\newcommand{\\a}{A\\b}\\newcommand{\\b}{B}\\a\\ and \\b{}c", "AB and Bc"),
        ("5\\,km, 3--4, a~b", "5km, 3–4, a b"),
        ("\\[ a \\] and $$b$$ and \\(c\\)", "\\[ a \\] and $$b$$ and \\(c\\)"),
        ("x\\begin{comment}\nno\n\\end{comment}y", "xy"),
        ("\\def\\w#1#2{#2-#1}\\w ab, \\w{one}{two}", "b-a, two-one"),
        ("50\\% of 5 \\& 6 % gone", "50% of 5 & 6"),
        ("\\begin{theorem}[Main] It holds.\\end{theorem}", "It holds."),
        ("at \\url{http://x.y/a%20b} now", "at http://x.y/a%20b now"),
        ("at \\url|http://x.y/a%20b| now", "at http://x.y/a%20b now"),
        ("\\path{C:/a%b}, \\nolinkurl{c%d@e.f}", "C:/a%b, c%d@e.f"),
        ("\\url{http://x.y/{a}%20b\\#c} now", "http://x.y/{a}%20b#c now"),
        ("\\href{http://x.y/a%2Fb}{50\\% of it} % gone\nnow", "50% of it\nnow"),
        ("\\href [pdfnewwindow] {http://x.y/a%2Fb}{it} now", "it now"),
        ("\\newcommand{\\doi}[1]{\\url{http://doi.org/#1}}see \\doi{10.1/a}", "see http://doi.org/10.1/a"),
        ("\\url{never closed % gone\n\nnext", "never closed\n\nnext"),
        ("\\footnote{see \\url{http://x.y/a%20b}.} now", "(see http://x.y/a%20b.) now"),
        ("\\section{Of \\verb|%a|}", "## Of `%a`"),
        ("a\\verb|%|b \\verb*+\\url{%}+ c", "a`%`b `\\url{%}` c"),
        ("\\lstinline[language=C]{a % b} and \\lstinline!50%! and \\mintinline{c}|x%y|", "`a % b` and `50%` and `x%y`"),
        ("\\begin{lstlisting}[language=C]\na % b \\\\\n\\end{lstlisting}\nnow", "```\na % b \\\\\n```\nnow"),
        ("\\MakeShortVerb{\\|}of |a%b| now", "of `a%b` now"),
        ("of |a% gone\nb| now", "of |ab| now"),
        ("a \\\\% gone\nb", "a\nb"),
        ("a \\\\\\% stays", "a\n% stays"),
        ("% \\begin{verbatim}\nx % y\nz", "x\nz"),
        (
            r"\newcommand{\path}{\mathsf{P}}Let $\path$ be a path of $G$ and $x$ a vertex",
            r"Let $\mathsf{P}$ be a path of $G$ and $x$ a vertex",
        ),
        (r"\newcommand{\path}{P}$\path_1 \neq \path_2$ now", r"$P_1 \neq P_2$ now"),
        (r"with $\path_1 \neq \path_2$ now", r"with $\path_1 \neq \path_2$ now"),
        (r"\def\url#1{\texttt{#1}}at \url{http://a.b/c} now", "at http://a.b/c now"),
        (r"\renewcommand{\url}{\texttt}at \url{http://a.b/c} now", "at http://a.b/c now"),
        (r"\let\old\url at \url{http://a.b/%20c} now", "at http://a.b/%20c now"),
        ("%\\def\\url#1{}\nat \\url{http://a.b/%20c} now", "at http://a.b/%20c now"),
        (r"\newcommand{\code}[1]{\lstinline{#1}}Use \code{foo} now", "Use foo now"),
        (r"\newcommand{\code}[1]{\mintinline{c}|#1|}Use \code{foo} now", "Use foo now"),
        (r"Use \lstinline|#1| now", "Use `#1` now"),
        ("%\\MakeShortVerb{\\|}\nthe $|x|$ now", "the $|x|$ now"),
        (r"\MakeShortVerb{\|}of |a%b| \DeleteShortVerb{\|}the $|x|$ now", "of `a%b` the $|x|$ now"),
    ],
)
def test_pieces_of_tex(tmp_path: Path, source: str, text: str) -> None:
    (tmp_path / "p.tex").write_text("\\documentclass{article}\\begin{document}\n" + source + "\n\\end{document}")
    found, _ = read(tmp_path)
    assert [each.parts[0] for each in found] == [text + "\n"]


def test_files_are_found_where_the_source_says_and_nowhere_else(tmp_path: Path) -> None:
    files = {
        "paper/main.tex": "\\documentclass{a}\\makeatletter\\def\\input@path{{parts/}{more/deep/}}\\makeatother\\begin{document}"
        "\\input{one} \\input two \\include{three} \\import{sub/}{four} \\subimport*{sub}{six}"
        "\\input{../outside} \\input{/etc/hostname}",
        "paper/parts/one.tex": "One.",
        "paper/more/deep/two.tex": "Two.",
        "paper/three.tex": "Three.",
        "paper/sub/four.tex": "Four. \\input{five}",
        "paper/sub/five.tex": "Five.",
        "paper/sub/six.tex": "Six.",
        "outside.tex": "Outside.",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found, _ = read(tmp_path / "paper")
    assert [each.parts[0].split() for each in found] == [["One.", "Two.", "Three.", "Four.", "Five.", "Six."]]


def test_of_the_files_that_are_included_those_count_that_includeonly_names(tmp_path: Path) -> None:
    head = "\\documentclass{a}\\includeonly{b, c.tex}\\begin{document}"
    (tmp_path / "main.tex").write_text(head + "".join(f"\\include{{{name}}}" for name in "abc") + "\\input{a}")
    for name in "abc":
        (tmp_path / f"{name}.tex").write_text(f"{name.upper()}. ")
    assert read(tmp_path)[0][0].parts[0].split() == ["B.", "C.", "A."]


def test_macros_without_end_and_files_in_a_circle_are_told_of(tmp_path: Path) -> None:
    head = "\\documentclass{article}\\begin{document}"
    doubling = "".join(f"\\def\\{chr(98 + n)}{{\\{chr(97 + n)}\\{chr(97 + n)}}}" for n in range(20))
    for name, body in (
        ("loop", "\\def\\a{\\a}\\a"),
        ("bomb", "\\def\\a{0123456789}" + doubling + "\\u\\u\\u\\u"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.tex").write_text(head + body)
    (tmp_path / "circle").mkdir()
    (tmp_path / "circle/m.tex").write_text(head + "M \\input{n}")
    (tmp_path / "circle/n.tex").write_text("N \\input{m} \\input{n}")
    started = time.perf_counter()
    found, rejected = read(tmp_path)
    assert time.perf_counter() - started < 10
    assert [each.parts[0].split() for each in found] == [["M", "N"]]
    assert [each.reason for each in rejected] == ["macros that do not come to an end"] * 2


def test_broken_sources_take_time_in_proportion_to_their_length(tmp_path: Path) -> None:
    for unit in (
        "\\section{",
        "$x ",
        "\\begin{equation}",
        "{",
        "\\footnote[",
        "%\n",
        "\\verb|",
        "\\item[",
        "\\[",
        "\\url{",
        "\\url|",
        "\\href{x}{",
    ):
        (tmp_path / "p.tex").write_text("\\documentclass{a}\\begin{document}" + unit * (300_000 // len(unit)))
        started = time.perf_counter()
        read(tmp_path)
        assert time.perf_counter() - started < 6, unit


def test_old_sources_in_latin_1_are_read(tmp_path: Path) -> None:
    (tmp_path / "p.tex").write_bytes("\\documentclass{a}\\begin{document}Käse".encode("latin-1"))
    assert read(tmp_path)[0][0].parts == ("Käse\n",)


def test_a_path_of_tikz_is_no_url(tmp_path: Path) -> None:
    (tmp_path / "a.tex").write_text(
        "\\documentclass{a}\\begin{document}\\path (0,0) node {a}; then ( all that follows\n\\end{document}"
    )
    assert "then ( all that follows" in read(tmp_path)[0][0].parts[0]


def test_short_forms_of_verb_count_from_where_they_are_made_in_reading_order(tmp_path: Path) -> None:
    for name, text in {
        "main.tex": "\\documentclass{a}\\begin{document}\\input{z}"
        "\\MakeShortVerb{\\|}\\input{b}\\DeleteShortVerb{\\|}\\input{a}\\end{document}",
        "z.tex": "one $|x|$ ",
        "b.tex": "two |y%z| ",
        "a.tex": "three $|w|$",
    }.items():
        (tmp_path / name).write_text(text)
    assert squeezed(read(tmp_path)[0][0].parts[0]).strip() == "one $|x|$ two `y%z` three $|w|$"


def test_a_paper_in_a_folder_includes_from_its_own_directory(tmp_path: Path) -> None:
    paper = {
        "paper/main.tex": "\\documentclass{a}\\def\\input@path{{parts/}}"
        "\\begin{document}\\input{sec/one}\\input{two}\\end{document}",
        "paper/sec/one.tex": "One. \\input{sec/deep}",
        "paper/sec/deep.tex": "Deep. ",
        "paper/parts/two.tex": "Two. ",
    }
    (tmp_path / "p.tar.gz").write_bytes(archive(paper))
    found, rejected = read(tmp_path)
    assert not rejected and [squeezed(each.parts[0]).strip() for each in found] == ["One. Deep. Two."]


@pytest.mark.parametrize("piece", ["\\verb|x\n", '\\verb!x \\verb"x \\verb+x ', "\\begin{comment} ", "\\iffalse x "])
def test_what_is_not_closed_is_not_searched_for_again(piece: str) -> None:
    def seconds(count: int) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            lexed("\\verb~" * count + piece * count + "\\begin{comment}" * count, [])
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(16_000) < 3.2 * seconds(8_000) + 0.005
